"""Ranks that declare what is identical on all of them: it is written once."""

from __future__ import annotations

import pytest
import torch
from ranks import run
from support import assert_same

from dtruntime import CheckpointManager, InvalidArgument

REPLICAS = """
def replica_of(step):
    torch.manual_seed(step)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(rank)
    rng = generator.get_state()
    return {"model": model, "optimizer": optimizer, "step": step, "rng": rng}

def same_replica(one, other):
    models = zip(one["model"].parameters(), other["model"].parameters())
    moments = [x["optimizer"].state_dict()["state"][0]["exp_avg"] for x in (one, other)]
    return (all(torch.equal(a, b) for a, b in models) and torch.equal(*moments)
        and one["step"] == other["step"])

REPLICATED = ["model.*", "optimizer.*", "step"]
"""


def test_replicas_are_written_once_and_load_on_any_number_of_ranks(coordinator, tmp_path):
    store = tmp_path / "store"
    run(
        REPLICAS
        + """
with CheckpointManager(store, replicated=REPLICATED, compression="none") as manager:
    state = replica_of(1)
    manager.prewarm(state)
    manager.save(state, step=1)
    live = replica_of(2)
    assert manager.restore(live).step == 1
    assert same_replica(live, replica_of(1)) and torch.equal(live["rng"], state["rng"])
""",
        store,
        coordinator.url,
    )
    sizes = [shard.stat().st_size for shard in store.glob("*/*.shard")]
    one_replica = 3 * 4 * (300 * 300 + 300 + 300 * 20 + 20)  # weights and two moments
    assert one_replica < sum(sizes) < 1.1 * one_replica
    assert max(sizes) < 1.3 * min(sizes)
    # Five ranks continue from the shards of three.
    outputs = run(
        REPLICAS
        + """
with CheckpointManager(store, replicated=REPLICATED) as manager:
    live = replica_of(2)
    try:
        manager.restore(live)
    except InvalidArgument as error:
        print("`rng` is rank-specific" in str(error), same_replica(live, replica_of(2)))
    own = live.pop("rng")
    report = manager.restore(live)
    assert same_replica(live, replica_of(1))
    print(report.step, dict(report.skipped))
    manager.save(live | {"rng": own}, step=2)
    print(manager.all_steps(), manager.verify().ok)
""",
        store,
        coordinator.url,
        world_size=5,
    )
    told = "True True\n1 {'rng': 'not asked for'}\n[1, 2] True\n"
    assert outputs == [told] * 5
    with CheckpointManager(store, read_only=True) as evaluator:
        with pytest.raises(
            InvalidArgument, match=r"`rng` is rank-specific.*5 ranks|5 ranks.*`rng`"
        ):
            evaluator.load()
        weights = evaluator.load(keys=["model.*"])["model"]
        named = evaluator.load(from_rank=4)
        assert_same(named["model"], weights)
        assert evaluator.load(keys=["model.*"], mmap=True).keys() == {"model"}
        generator = torch.Generator().manual_seed(4)
        assert torch.equal(named["rng"], generator.get_state())


def test_a_missing_shard_of_another_rank_is_fallen_back_from_and_reported(coordinator, tmp_path):
    store = tmp_path / "store"
    run(
        REPLICAS
        + """
with CheckpointManager(store, replicated=REPLICATED) as manager:
    for step in (1, 2):
        manager.save(replica_of(step) | ({"log": "of rank 0"} if rank == 0 else {}), step=step)
""",
        store,
        coordinator.url,
        world_size=2,
    )
    [shard] = store.glob("step-000000000002/rank-00001.*.shard")
    shard.unlink()
    with CheckpointManager(store, read_only=True, rank=0, world_size=2) as evaluator:
        state = evaluator.load()
        assert (state["step"], state["log"]) == (1, "of rank 0")
        [(step, why)] = evaluator.last_load.fell_back_from
        assert step == 2
        assert "rank-00001" in why


def test_entries_that_differ_are_refused_as_replicas_on_every_rank(coordinator, tmp_path):
    outputs = run(
        """
        with CheckpointManager(store, replicated=["w", "rank"]) as manager:
            try:
                manager.save(state_of(1), step=1)
            except InvalidArgument as error:
                print("disagree", error)
            except SaveAborted as error:
                print("disagree", error)
            print(manager.all_steps())
        try:
            CheckpointManager(store, replicated=["w", ""])
        except InvalidArgument as error:
            print(error.why)
        """,
        tmp_path / "store",
        coordinator.url,
        world_size=2,
    )
    for output in outputs:
        for told in ("disagree", "`rank` is", "[]", "a glob is a non-empty string"):
            assert told in output, output


def test_a_glob_that_matches_nothing_fails_the_save_on_all(coordinator, tmp_path):
    outputs = run(
        """
        with CheckpointManager(store, replicated=["w", "modle.*"]) as manager:
            for state in (state_of(1), torch.zeros(3)):
                try:
                    manager.save(state, step=1)
                except (InvalidArgument, SaveAborted) as error:
                    print(error)
            print(manager.all_steps())
        """,
        tmp_path / "store",
        coordinator.url,
        world_size=2,
    )
    for output in outputs:
        for told in ("nothing matches 'modle.*'", "w, rank, step", "(none)"):
            assert told in output, output
        assert output.endswith("[]\n"), output
