"""Reads the YAML of deploy/, so that its tests need no other package.

Block mappings and sequences, flow sequences on one line, quoted and plain scalars, ``|`` and ``>``,
anchors, merge keys, several documents. Whatever else YAML has is an error that names the line: what
this accepts means the same to every YAML parser.
"""

from __future__ import annotations

import json
import re
from typing import Any

_KEY = re.compile(
    r"""("[^"]*"|'[^']*'|[^\s\[\]{}#&*!|>%@`,"'-][^#]*?|-[^\s#][^#]*?):(?:\s+(.*))?$"""
)
_ANCHOR = re.compile(r"&([\w-]+)\s*(.*)$")
_INTEGER = re.compile(r"-?(0|[1-9]\d*)$")
_BLOCK = re.compile(r"([|>])(-?)$")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}


class NotYamlError(Exception):
    """Text that this cannot read."""


class _Lines:
    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.at = 0
        self.anchors: dict[str, Any] = {}

    def fail(self, why: str) -> NotYamlError:
        return NotYamlError(f"line {self.at + 1}: {why}: {self.lines[self.at]!r}")

    def peek(self) -> tuple[int, str] | None:
        """Return indentation and text of the next line with content."""
        while self.at < len(self.lines):
            line = _without_comment(self.lines[self.at])
            if "\t" in line:
                raise self.fail("a tab")
            if line.strip():
                return len(line) - len(line.lstrip()), line.strip()
            self.at += 1
        return None

    def replace(self, indentation: int, text: str) -> None:
        self.lines[self.at] = " " * indentation + text


def documents(text: str) -> list[Any]:
    """Return every document of a file."""
    parts = re.split(r"^---\s*$", text, flags=re.MULTILINE)
    # Line numbers of a later part are those of the part; the part is short.
    return [_document(part) for part in parts if _Lines(part).peek() is not None]


def document(text: str) -> Any:
    """Return the only document of a file."""
    [only] = documents(text)
    return only


def _document(text: str) -> Any:
    lines = _Lines(text)
    first = lines.peek()
    assert first is not None
    value = _node(lines, first[0])
    if lines.peek() is not None:
        raise lines.fail("more than one value")
    return value


def _without_comment(line: str) -> str:
    quote = ""
    for index, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and (index == 0 or line[index - 1] in " [,-:"):
            quote = character
        elif character == "#" and (index == 0 or line[index - 1] == " "):
            return line[:index]
    return line


def _node(lines: _Lines, indentation: int) -> Any:
    _, text = lines.peek() or (0, "")
    if text == "-" or text.startswith("- "):
        return _sequence(lines, indentation)
    if _KEY.match(text):
        return _mapping(lines, indentation)
    lines.at += 1
    return _scalar(lines, text)


def _sequence(lines: _Lines, indentation: int) -> list[Any]:
    values = []
    while (found := lines.peek()) and found[0] == indentation:
        text = found[1]
        if not (text == "-" or text.startswith("- ")):
            break
        rest = text[1:].strip()
        if not rest:
            raise lines.fail("an empty item")
        if _BLOCK.match(rest):
            lines.at += 1
            values.append(_block(lines, rest, indentation))
        elif _KEY.match(rest) or rest.startswith("- "):
            lines.replace(indentation + 2, rest)
            values.append(_node(lines, indentation + 2))
        else:
            lines.at += 1
            values.append(_scalar(lines, rest))
    return values


def _mapping(lines: _Lines, indentation: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    while (found := lines.peek()) and found[0] == indentation:
        match = _KEY.match(found[1])
        if match is None:
            raise lines.fail("a key is expected")
        key = str(_scalar(lines, match[1])) if match[1][0] in "\"'" else match[1]
        if key in values:
            raise lines.fail("the key is there already")
        lines.at += 1
        value = _value(lines, (match[2] or "").strip(), indentation)
        if key == "<<":
            merged |= value
        else:
            values[key] = value
    if lines.peek() and lines.peek()[0] > indentation:  # type: ignore[index]
        raise lines.fail("the indentation is wrong")
    return merged | values


def _value(lines: _Lines, text: str, indentation: int) -> Any:
    anchor = _ANCHOR.match(text)
    if anchor:
        value = _value(lines, anchor[2], indentation)
        lines.anchors[anchor[1]] = value
        return value
    if _BLOCK.match(text):
        return _block(lines, text, indentation)
    if text:
        return _scalar(lines, text)
    found = lines.peek()
    if found is None or found[0] < indentation:
        return None
    if found[0] > indentation or found[1].startswith("- "):
        return _node(lines, found[0])
    return None


def _block(lines: _Lines, style: str, indentation: int) -> str:
    taken: list[str] = []
    while lines.at < len(lines.lines):
        line = lines.lines[lines.at]
        if line.strip() and len(line) - len(line.lstrip()) <= indentation:
            break
        taken.append(line)
        lines.at += 1
    while taken and not taken[-1].strip():
        taken.pop()
    margin = min(len(line) - len(line.lstrip()) for line in taken if line.strip())
    taken = [line[margin:] for line in taken]
    if style.startswith(">"):
        if not all(line.strip() and not line.startswith(" ") for line in taken):
            raise lines.fail("`>` is read for one paragraph only")
        taken = [" ".join(taken)]
    return "\n".join(taken) + ("" if style.endswith("-") else "\n")


def _scalar(lines: _Lines, text: str) -> Any:
    if text[:1] == '"':
        return json.loads(text)
    if text[:1] == "'":
        if not re.fullmatch(r"'[^']*'", text):
            raise lines.fail("a quoted scalar does not end")
        return text[1:-1]
    if text[:1] == "[":
        if not re.fullmatch(r"\[[^\[\]{}]*\]", text):
            raise lines.fail("a flow sequence on one line is expected")
        inner = text[1:-1].strip()
        return [_scalar(lines, item.strip()) for item in inner.split(",")] if inner else []
    if text[:1] == "*":
        if text[1:] not in lines.anchors:
            raise lines.fail("no such anchor")
        return lines.anchors[text[1:]]
    if text[:1] in "{}]&!|>%@`?," or ": " in text or " #" in text:
        raise lines.fail("quote this")
    if text in _WORDS:
        return _WORDS[text]
    # What older parsers interpret differently.
    if re.fullmatch(r"(?i)yes|no|on|off|y|n|\d+:\d+(:\d+)*|0[0-7]+|0x[0-9a-f]+|[\d.]+e\d+", text):
        raise lines.fail("quote this: parsers differ")
    return int(text) if _INTEGER.match(text) else text
