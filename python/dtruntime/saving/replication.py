"""Replicated entries: what is identical on all ranks, and the memory this rank writes of it.

Always holds: the entries are selected by paths alone, so ranks with the same globs and the same
state get the same result; the engine compares their contents before a checkpoint is created.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, NamedTuple

from dtruntime import _native
from dtruntime.errors import InvalidArgument
from dtruntime.messages import listed, quoted
from dtruntime.state.globs import compiled
from dtruntime.state.tree import TAG_DICT, TAG_TENSOR, Tree

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from dtruntime.state.state_tree import FlatState
    from dtruntime.state.tensors import TensorRecord
    from dtruntime.state.tree import Node

_NAMED_MAX = 3
"""Entries that an error names."""
_NOT = "!"
"""Prefix of a glob that excludes."""
_GENERATOR_BYTES = 5056
"""The size of ``torch.get_rng_state()``."""


class Replicated(NamedTuple):
    """The replicated part of one state.

    Attributes:
        nodes: The topmost nodes of its entries, ascending.
        parts: By storage: the part that this rank writes, as ``(start, end)``.

    """

    nodes: list[int]
    parts: dict[int, tuple[int, int]]

    def part(self, storage: int) -> tuple[int, int] | None:
        """Return this rank's part of a storage; None for one that is not replicated."""
        return self.parts.get(storage)


class Replication:
    """Globs over the paths of a state, and how its memory is divided among the ranks.

    Args:
        globs: As for ``load(keys=...)``; one that is prefixed with ``!`` excludes.
        share: Takes the sizes of storages, and returns this rank's part of each.

    Raises:
        InvalidArgument: All of them exclude.

    """

    def __init__(
        self, globs: Sequence[str], share: Callable[[list[int]], list[tuple[int, int]]]
    ) -> None:
        self._globs = globs
        self._patterns = compiled([glob.removeprefix(_NOT) for glob in globs])
        marked = list(zip(globs, self._patterns, strict=True))
        self._named = [pattern for glob, pattern in marked if not glob.startswith(_NOT)]
        self._exempt = [pattern for glob, pattern in marked if glob.startswith(_NOT)]
        self._share = share
        if not self._named:
            raise InvalidArgument(
                f"setting `replicated` = {list(globs)!r}",
                "it only excludes entries",
                f"also name what is replicated: `replicated={['*', *globs]!r}`",
            )

    def of(
        self,
        nodes: list[Node],
        storage_of: Sequence[int],
        sizes: Sequence[int],
        is_slice: Sequence[bool],
    ) -> Replicated:
        """Find the replicated entries of a state.

        Args:
            nodes: The state.
            storage_of: By tensor: its storage.
            sizes: By storage: its bytes.
            is_slice: By tensor: whether it is this rank's part of a sharded tensor, which is
                replicated as a whole.

        Raises:
            InvalidArgument: A glob matches nothing.

        """
        tree = Tree(nodes)
        tops = self._tops(tree, _native.paths_of(nodes))
        storages = dict.fromkeys(
            storage_of[nodes[position][1]]
            for top in tops
            for position in range(top, tree.ends[top])
            if nodes[position][0] == TAG_TENSOR and not is_slice[nodes[position][1]]
        )
        parts = self._share([sizes[storage] for storage in storages])
        return Replicated(tops, dict(zip(storages, parts, strict=True)))

    def _tops(self, tree: Tree, paths: list[str]) -> list[int]:
        """Return the topmost nodes that match.

        A container does not match because all of its children do: another rank's may have more.
        """
        tops: list[int] = []
        exempt = self._exempted(paths)
        unmatched = set(self._patterns)
        end = within = 0
        for index, path in enumerate(paths):
            if index < end or (index == 0 and tree.is_container(0)):
                continue
            after = bisect.bisect_left(exempt, index)
            next_exempt = exempt[after] if after < len(exempt) else len(paths)
            if next_exempt == index:
                end = tree.ends[index]
                continue
            hits = [pattern for pattern in self._named if pattern.match(path)]
            unmatched.difference_update(hits)
            if not hits and index >= within:
                continue
            if next_exempt < tree.ends[index]:  # not as a whole: something in it is excluded
                within = max(within, tree.ends[index])
                continue
            tops.append(index)
            end = tree.ends[index]
        # A glob may only match inside an entry that another one matched.
        for pattern in list(unmatched):
            if any(map(pattern.match, paths[1:])):
                unmatched.discard(pattern)
        if unmatched:
            self._refuse(tree, paths, unmatched)
        if not tops and exempt:
            raise InvalidArgument(
                f"saving with `replicated` = {list(self._globs)!r}",
                "its globs exclude everything that they include",
                "leave out a glob that begins with `!`",
            )
        return tops

    def _exempted(self, paths: list[str]) -> list[int]:
        """Return the excluded nodes, ascending."""
        if not self._exempt:
            return []
        return [
            index
            for index, path in enumerate(paths)
            if any(pattern.match(path) for pattern in self._exempt)
        ]

    def _refuse(self, tree: Tree, paths: list[str], unmatched: set[re.Pattern[str]]) -> None:
        globs = zip(self._globs, self._patterns, strict=True)
        missed = [repr(glob) for glob, pattern in globs if pattern in unmatched]
        top = [paths[child] for _, child in tree.children(0)] if tree.is_container(0) else []
        raise InvalidArgument(
            f"saving with `replicated` = {list(self._globs)!r}",
            f"nothing matches {', '.join(missed)}",
            f"the state's top-level entries are {', '.join(top) or '(none)'}; globs match dotted "
            "paths, such as `model.*`",
        )


def advice(flat: FlatState) -> Iterator[str]:
    """Yield warnings about entries of a state that several ranks may not restore as expected."""
    if not flat.replicated:
        if any(tensor.slice is not None for tensor in flat.tensors):
            yield (
                "the state has sharded tensors, and `replicated` is not set: another number of "
                "ranks can restore it only with `from_rank=`, which selects the rank whose other "
                'entries are used; with `replicated="*"`, or a list of what is identical on all '
                "ranks, this is not needed"
            )
        return
    if not any(map(_is_generator_state, flat.tensors)):  # no walk over a large state
        return
    tree = Tree(flat.nodes)
    for node in (node for top in flat.replicated for node in range(top, tree.ends[top])):
        tag, payload = flat.nodes[node][:2]
        if tag == TAG_TENSOR and _is_generator_state(flat.tensors[payload]):
            name = _native.paths_of(flat.nodes)[node]
            yield (
                f"`{name}` looks like the state of a random number generator, which differs "
                "between ranks, but `replicated` keeps only one: exclude it, with "
                f"`!{name}` after the other globs"
            )


def _is_generator_state(tensor: TensorRecord) -> bool:
    return tensor.dtype.endswith("uint8") and tensor.shape == (_GENERATOR_BYTES,)


def check_loadable(checkpoint: _native.Checkpoint, tree: Tree, asked: Iterable[int]) -> None:
    """Refuse entries that are not replicated, if another number of ranks saved the checkpoint.

    Args:
        checkpoint: The checkpoint that is read.
        tree: Its tree.
        asked: The requested nodes.

    Raises:
        InvalidArgument: Some of them are rank-specific.

    """
    if not checkpoint.is_replicated_only:
        return
    tops = checkpoint.replicated()
    shared = {node for top in tops for node in range(top, tree.ends[top])}
    # What surrounds replicated entries, such as a module's `_metadata`, is not rank-specific.
    around = _metadata_around(tree, tops)
    own = [
        index
        for index in asked
        if index not in shared and index not in around and tree.ends[index] == index + 1
    ]
    if not own:
        return
    names = checkpoint.paths()
    named = listed(quoted(names[index] or "the root" for index in own), _NAMED_MAX)
    shared_names = listed(quoted(names[top] or "everything" for top in tops), _NAMED_MAX)
    ranks = checkpoint.manifest()["world_size"]
    raise InvalidArgument(
        f"loading step {checkpoint.step}, which {ranks} ranks saved",
        f"{named} {'is' if len(own) == 1 else 'are'} rank-specific: each rank saved its own",
        f"request only what is replicated ({shared_names}), or choose a rank, as in `from_rank=0` "
        "(sharded tensors are still assembled from all ranks), or load with as many ranks",
    )


def _metadata_around(tree: Tree, tops: Sequence[int]) -> set[int]:
    """Return the nodes of `_metadata` of the dicts that contain a replicated entry."""
    around: set[int] = set()
    for index, (tag, payload, *_) in enumerate(tree.nodes):
        if tag != TAG_DICT or not payload[2]:
            continue
        after = bisect.bisect_right(tops, index)
        if after < len(tops) and tops[after] < tree.ends[index]:
            around.update(range(index + 1, tree.ends[index + 1]))
    return around
