"""Which entries of a state are replicated, and which memory is not touched for them."""

from __future__ import annotations

import fnmatch
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_same

from dtruntime import CheckpointManager, InvalidArgument, _native
from dtruntime.saving.replication import Replication, advice
from dtruntime.state.state_tree import flatten, needs_of
from dtruntime.state.tree import Tree


def whole(sizes):
    return [(0, size) for size in sizes]


def tops(state, *globs, share=whole):
    flat = flatten(state, Replication(globs, share))
    paths = _native.paths_of(flat.nodes)
    return [paths[node] for node in flat.replicated]


STATE = {
    "model": {"w": torch.zeros(4), "b": torch.zeros(2)},
    "optimizer": {"state": {0: {"m": torch.zeros(4)}}, "groups": [{"lr": 0.1}, {"lr": 0.2}]},
    "rng": torch.zeros(5),
    "step": 3,
}


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["model.*"], ["model.w", "model.b"]),
        (["model"], ["model"]),
        (["model.w"], ["model.w"]),
        (["*.lr"], ["optimizer.groups.0.lr", "optimizer.groups.1.lr"]),
        (["optimizer.state.0.*", "step"], ["optimizer.state.0.m", "step"]),
        (["step", "model.*", "model.w"], ["model.w", "model.b", "step"]),
        (["*"], ["model", "optimizer", "rng", "step"]),
        (["model", "optimizer.*", "rng"], ["model", "optimizer.state", "optimizer.groups", "rng"]),
    ],
)
def test_globs_select_the_topmost_entries(globs, expected):
    assert tops(STATE, *globs) == expected


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["*", "!rng"], ["model", "optimizer", "step"]),
        (["!rng", "*"], ["model", "optimizer", "step"]),
        (["*", "!model.b", "!rng"], ["model.w", "optimizer", "step"]),
        (["model", "!*.b"], ["model.w"]),
        (
            ["*", "!*.lr", "!model"],
            [
                "optimizer.state",
                "rng",
                "step",
            ],
        ),
        (["optimizer", "!optimizer.groups.1"], ["optimizer.state", "optimizer.groups.0"]),
    ],
)
def test_globs_exclude(globs, expected):
    assert tops(STATE, *globs) == expected


def test_globs_that_only_exclude_or_match_nothing_are_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="it only excludes entries"):
        CheckpointManager(tmp_path, replicated="!rng")
    with (
        CheckpointManager(tmp_path, replicated=["*", "!random"]) as manager,
        pytest.raises(InvalidArgument, match="nothing matches '!random'"),
    ):
        manager.save(STATE, step=1)


def test_entries_that_would_not_load_as_expected_are_warned_of():
    [said] = advice(flatten({"a": {"rng": torch.get_rng_state()}}, Replication(["*"], whole)))
    assert said.startswith("`a.rng` looks like the state of a random number generator")
    assert "`!a.rng`" in said
    assert list(advice(flatten(STATE, Replication(["*"], whole)))) == []
    assert list(advice(flatten({"rng": torch.get_rng_state()}))) == []


def test_a_container_without_entries_is_replicated_only_if_it_is_named():
    state = {"empty": {}, "list": [], "x": 1}
    assert tops(state, "x") == ["x"]
    assert tops(state, "empty") == ["empty"]
    assert tops(state, "*") == ["empty", "list", "x"]


def test_a_part_of_a_module_loads_anywhere(tmp_path):
    net = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 3)})
    with CheckpointManager(tmp_path, replicated="net.body.*") as manager:
        manager.save({"net": net, "x": 1}, step=1)
    with CheckpointManager(tmp_path, read_only=True, rank=1, world_size=2) as other:
        loaded = other.load(keys="net.body.*")["net"]
        assert list(loaded) == ["body.weight", "body.bias"]
        assert "body" in loaded._metadata
        with pytest.raises(InvalidArgument, match=r"`net.head.weight`, `net.head.bias`, `x` are"):
            other.load()


def test_a_leaf_may_be_the_whole_state():
    assert tops(torch.zeros(3), "*") == [""]


leaves = st.one_of(st.none(), st.integers(0, 3), st.just("text"))
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(states, st.lists(st.sampled_from(["a", "a.*", "*b", "b.0", "*", "*.c"]), min_size=1))
def test_entries_do_not_nest_and_cover_whatever_matches(state, globs):
    try:
        flat = flatten(state, Replication(globs, whole))
    except InvalidArgument:  # a glob matches nothing
        return
    tree = Tree(flat.nodes)
    paths = _native.paths_of(flat.nodes)
    covered = [range(top, tree.ends[top]) for top in flat.replicated]
    starts = [nodes.start for nodes in covered]
    assert starts == sorted(starts)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(covered))
    inside = {node for nodes in covered for node in nodes}
    for node, path in enumerate(paths):
        matches = any(fnmatch.fnmatchcase(path, glob) for glob in globs)
        if matches and (node or not tree.is_container(0)):
            assert node in inside, path
        if node in inside:
            above = [p for n, p in enumerate(paths) if n <= node < tree.ends[n]]
            assert any(fnmatch.fnmatchcase(p, glob) for p in above for glob in globs), path


def test_memory_that_another_rank_writes_is_not_touched():
    asked = []

    def share(sizes):
        asked.extend(sizes)
        return [(0, 0), *whole(sizes[1:])]

    state = {"own": torch.zeros(100), "a": torch.zeros(300), "b": np.zeros(7), "c": torch.ones(50)}
    flat = flatten(state, Replication(["a", "b", "c"], share))
    assert asked == [1200, 56, 200], "by first appearance"
    memory = {flat.tensors[node[1]].storage for node in flat.nodes if node[-1] == "a"}
    [not_read] = memory
    assert flat.storages[not_read].memory is None
    assert all(flat.storages[n].memory is not None for n in range(4) if n != not_read)
    asked.clear()
    assert needs_of(state, Replication(["a", "b", "c"], share)) == (400 + 56 + 200, [])


def test_tied_memory_is_divided_once(tmp_path):
    memory = torch.arange(1000.0)
    state = {"model": {"w": memory, "tied": memory, "part": memory[10:20]}, "own": memory[5:7]}
    with CheckpointManager(tmp_path, replicated="model.*") as manager:
        manager.save(state, step=1)
    with CheckpointManager(tmp_path, read_only=True, rank=3, world_size=7) as other:
        loaded = other.load(keys="model.*")["model"]
        assert loaded["w"] is loaded["tied"]
        loaded["w"][10] = -1
        assert loaded["part"][0] == -1
        with pytest.raises(InvalidArgument, match=r"`own` is rank-specific"):
            other.load()


def test_a_state_that_is_replicated_as_a_whole_loads_anywhere(tmp_path):
    with CheckpointManager(tmp_path, replicated="*") as manager:
        manager.save(STATE, step=1)
    with CheckpointManager(tmp_path, read_only=True, rank=3, world_size=7) as other:
        assert other.load()["step"] == 3
        live = {"rng": torch.ones(5), "step": 0}
        assert other.restore(live).skipped == {
            "model": "not asked for",
            "optimizer": "not asked for",
        }
        assert live["step"] == 3
        assert not live["rng"].any()


def test_a_wrong_argument_is_explained(tmp_path):
    with pytest.raises(InvalidArgument, match="a glob is a non-empty string, got 3"):
        CheckpointManager(tmp_path, replicated=[3])
    with pytest.raises(InvalidArgument, match="a glob is a non-empty string, got True"):
        CheckpointManager(tmp_path, replicated=True)


def test_own_memory_beside_replicated_memory_is_refused(tmp_path):
    memory = torch.arange(1000.0)
    grid = memory[:100].view(10, 10)
    refused = [
        {"w": memory[:500], "own": memory[500:]},
        {"w": memory[:500], "own": memory[400:600]},
        {"w": grid[:, :5], "own": grid[:, 5:]},
        {"w": grid[:, :5], "own": grid[2, 6:8]},
    ]
    taken = [
        {"w": memory, "own": memory[500:]},
        {"w": grid.t(), "own": grid[:, 5:]},
        {"w": [memory[:500], memory[500:]], "own": memory[400:600]},
        {"w": grid[:, :5], "own": memory[200:300].clone()},
        {"w": memory[:5], "own": memory[700:700]},
    ]
    with CheckpointManager(tmp_path, replicated="w") as manager:
        for state in refused:
            with pytest.raises(InvalidArgument, match=r"saving `own`.*shares memory"):
                manager.save(state, step=1)
        assert manager.all_steps() == []
        for step, state in enumerate(taken):
            manager.save(state, step=step)
            assert_same(manager.load(step=step), state)
