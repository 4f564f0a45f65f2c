"""The comparison with other engines runs as a whole, at a tiny size; its arithmetic is right."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

COMPARE = Path(__file__).parents[2] / "benches/compare"
sys.path.insert(0, str(COMPARE))

import auto  # noqa: E402
import chart  # noqa: E402
import engines  # noqa: E402
import limits  # noqa: E402
import make_state  # noqa: E402
import multi_rank  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import state  # noqa: E402
import tables  # noqa: E402

FIGURES = (
    "stall_seconds",
    "durable_seconds",
    "load_seconds",
    "restore_seconds",
    "disk_bytes",
    "cpu_seconds",
    "extra_bytes",
    "training_lost_seconds",
)
README = "before\n<!-- compare:begin -->\nold numbers\n<!-- compare:end -->\nafter\n"


@pytest.fixture(autouse=True)
def _torch_settings_are_restored():
    """Training a state changes torch's settings; later tests need its defaults."""
    is_deterministic, threads = (
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )
    yield
    torch.use_deterministic_algorithms(is_deterministic)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict:
    """Run the harness once, with every peer that is installed, and return its record."""
    if shutil.which("fio") is None:
        pytest.skip("fio is not on PATH; on Debian and Ubuntu: apt install fio")
    folder = tmp_path_factory.mktemp("compare")
    results = folder / "results.json"
    command = [sys.executable, str(COMPARE / "compare.py"), "--size", "tiny", "--gentle"]
    command += ["--installed-only", "--folder", str(folder / "runs"), "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    assert not (folder / "runs").exists(), "checkpoints were left behind"
    return {**json.loads(results.read_text()), "said": done.stderr, "printed": done.stdout}


@pytest.mark.parametrize("entrant", engines.ENTRANTS, ids=lambda entrant: entrant.key)
def test_every_engine_reports_every_figure(run, entrant):
    if entrant.key not in run["values"]:
        assert f"left out: {entrant.title}" in run["said"]
        pytest.skip(f"{entrant.title} is not installed; `make compare` installs it")
    for figure in FIGURES:
        assert run["values"][entrant.key][figure], figure
    assert run["values"][entrant.key]["durable_seconds"][0] > 0
    assert f"| {entrant.title} |" in run["printed"]
    assert entrant.settings in run["said"]


def test_ranks_save_and_restore_with_every_engine(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- ranks:begin -->\n<!-- ranks:end -->\n")
    command = [sys.executable, str(COMPARE / "multi_rank.py"), "--size", "tiny", "--rounds", "1"]
    command += ["--gentle", "--folder", str(tmp_path / "runs"), "--readme", str(readme)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "runs").iterdir()), "checkpoints were left behind"
    for entrant in multi_rank.ENTRANTS:
        assert readme.read_text().count(f"\n| {entrant.title} |") == len(entrant.layouts)


def test_limits_are_measured_in_the_same_run(run):
    for subject, figure in (
        ("copy", "stall_seconds"),
        ("fio_huge", "durable_seconds"),
        ("fio_huge", "load_seconds"),
        ("fio", "durable_seconds"),
        ("fio", "load_seconds"),
    ):
        assert all(value >= 0 for value in run["values"][subject][figure])
    assert run["values"]["copy"]["stall_seconds"][0] > 0


def test_a_run_is_written_as_a_section_and_a_chart(run, tmp_path):
    readme, picture = tmp_path / "README.md", tmp_path / "results.svg"
    readme.write_text(README)
    for _ in range(2):
        tables.rewrite(readme, "compare", report.text(run))
    written = readme.read_text()
    assert written.startswith("before\n")
    assert written.endswith("\nafter\n")
    assert "old numbers" not in written
    assert written.count("| dtruntime |") == 1
    chart.write(picture, run)
    drawn = ET.parse(picture).getroot()  # noqa: S314  (our own file)
    shown = "".join(drawn.itertext())
    assert all(
        e.title.replace("`", "") in shown for e in engines.ENTRANTS if e.key in run["values"]
    )
    assert run["machine_text"] in shown


def test_a_document_without_marks_is_unchanged(tmp_path):
    readme = tmp_path / "README.md"
    for text in ("no marks", "<!-- s3:begin -->", "<!-- s3:end -->", README):
        readme.write_text(text)
        with pytest.raises(SystemExit, match="hint: write"):
            tables.rewrite(readme, "s3", "new numbers")
        assert readme.read_text() == text


def record(**changes: float) -> dict:
    """Make a record that meets every limit, except for the changes: `subject__figure=value`."""
    raw = 1_000_000_000.0
    values = {
        "copy": {"stall_seconds": 0.20},
        "dcp_async": {"stall_seconds": 0.30, "load_seconds": 2.0},
        "dtruntime_auto": {"stall_seconds": 0.21, "load_seconds": 1.0, "extra_bytes": raw},
        "dtruntime_none": {"durable_seconds": 1.0},
        "dtruntime_float": {"durable_seconds": 0.9, "disk_bytes": 0.8 * raw},
        "pair": {"fio_seconds": 0.9, "none_seconds": 1.0},
        "weights": {"disk_bytes": 66.0, "raw_bytes": 100.0},
        "fio_huge": {"load_seconds": 0.5},
        "small": {"extra_bytes": 100.0, "staging_bytes": 100.0},
        "endurance": {"saves": 200.0}
        | {
            f"{moment}_{what}": 7.0
            for moment in ("before", "warm", "end", "closed")
            for what in ("resident_bytes", "descriptors", "threads")
        },
    }
    for name, value in changes.items():
        subject, figure = name.split("__")
        values[subject][figure] = value
    nested = {s: {f: [v] for f, v in figures.items()} for s, figures in values.items()}
    return {"raw_bytes": int(raw), "values": nested}


@pytest.mark.parametrize(
    ("changes", "figure"),
    [
        ({"dtruntime_auto__stall_seconds": 0.24}, "stall of a warm `save_async`"),
        ({"pair__none_seconds": 1.1}, "durable save, `none`"),
        ({"dtruntime_float__durable_seconds": 1.01}, "durable save, `float`"),
        ({"dtruntime_float__disk_bytes": 0.83e9}, "bytes on disk, `float`"),
        ({"weights__disk_bytes": 68.0}, "bytes on disk, `float`, bf16 weights alone"),
        ({"dtruntime_auto__load_seconds": 1.3}, "load, caches dropped"),
        (
            {"dtruntime_auto__extra_bytes": 1.1e9},
            "extra memory during a save, default staging",
        ),
        ({"small__extra_bytes": 8e7}, "extra memory during a save, an eighth of the state"),
        ({"endurance__end_resident_bytes": 9e6}, "memory over 200 saves"),
        ({"endurance__closed_threads": 8.0}, "descriptors and threads left behind"),
        ({"endurance__end_descriptors": 8.0}, "descriptors and threads left behind"),
    ],
)
def test_each_verdict_can_fail_by_itself(changes, figure):
    assert all(verdict.is_met for verdict in report.verdicts(report.results_of(record())))
    found = report.verdicts(report.results_of(record(**changes)))
    assert [verdict.figure for verdict in found if not verdict.is_met] == [figure]


def test_the_mapped_state_equals_the_trained_one(tmp_path):
    made = make_state.train(make_state.SIZES["tiny"])
    state.write(tmp_path, made)
    shared = state.Shared(tmp_path)
    mapped = state.map_state(shared.descriptor, shared.index)
    theirs, ours = state.flatten(made), state.flatten(mapped)
    assert set(ours) == set(theirs)
    for path, value in theirs.items():
        if isinstance(value, (int, str)):
            assert ours[path] == value
        else:
            assert ours[path].dtype == value.dtype
            assert ours[path].tolist() == value.tolist()
    weights = [path for path in ours if path.startswith("model/")]
    assert all(ours[f"optimizer/{p.split('/')[1]}/exp_avg_sq"].any() for p in weights)
    shared.close()


def test_a_part_of_the_state_holds_whole_parameters(tmp_path):
    state.write(tmp_path, make_state.train(make_state.SIZES["tiny"]))
    index = state.Index.read(tmp_path)
    part = state.within(index, index.raw_bytes // 2)
    owners = {state.owner(path) for path in part}
    whole = {entry.path for entry in index.entries if state.owner(entry.path) in owners}
    assert part == whole
    assert 0 < sum(e.bytes for e in index.entries if e.path in part) <= index.raw_bytes // 2


def test_the_bare_copy_copies_every_byte_once(tmp_path):
    state.write(tmp_path, make_state.train(make_state.SIZES["tiny"]))
    shared = state.Shared(tmp_path)
    mapped = state.map_state(shared.descriptor, shared.index)
    copy = limits.BareCopy(mapped)
    assert copy.bytes == shared.index.raw_bytes
    assert copy.seconds() > 0
    tensors = [v for v in state.flatten(mapped).values() if hasattr(v, "nbytes")]
    expected = b"".join(state.bits_of(tensor).numpy().tobytes() for tensor in tensors)
    assert copy.copied() == expected
    first, second = limits.halves(tensors, copy.bytes)
    sizes = [sum(source.nbytes for source, _ in half) for half in (first, second)]
    assert abs(sizes[0] - sizes[1]) <= 1
    shared.close()


def test_requirements_pin_exact_versions():
    found = {r.name: str(r.specifier) for _, r in peers.requirements()}
    assert set(found) == {"torch", "safetensors", "torch_checkpointing"}
    assert all(re.fullmatch(r"==[\d.]+", pin) for pin in found.values())
    lock = (COMPARE.parents[1] / "requirements-dev.lock").read_text()
    for name in ("torch", "safetensors"):
        assert f"\n{name}{found[name]}" in lock, "the comparison runs with what CI tests"


def test_auto_is_judged_against_the_better_of_both():
    results = report.results_of({"raw_bytes": 100, "values": {}})
    for codec, seconds in (("none", 2.0), ("float", 1.0), ("auto", 1.06)):
        results.add("200", codec, seconds)
        results.add("200", f"{codec}_bytes", 80.0)
    results.add("200", "raw_bytes", 100.0)
    assert "**not met**" in auto.rate_row(results, "200")
    results.values["200"]["auto"] = [1.05]
    assert auto.rate_row(results, "200").endswith("| met |")


def test_auto_needs_root():
    done = subprocess.run(
        [sys.executable, "-c", "import os, auto; os.geteuid = lambda: 1000; auto.main()"],
        cwd=COMPARE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "needs root" in done.stderr
    assert "hint: " in done.stderr
