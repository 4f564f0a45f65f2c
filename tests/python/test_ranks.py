"""Several processes that save and load one checkpoint through a coordinator."""

from __future__ import annotations

import signal

import pytest
from ranks import run, start
from support import flip_byte

from dtruntime import CheckpointManager, InvalidArgument


def test_all_ranks_save_and_load_one_checkpoint(coordinator, tmp_path):
    store = tmp_path / "store"
    outputs = run(
        """
        with CheckpointManager(store, keep_last_n=2) as manager:
            try:
                manager.load()
            except CheckpointNotFound as error:
                print("empty")
            for step in (1, 2, 3):
                handle = manager.save_async(state_of(step), step=step)
            assert handle.result().step == 3
        with CheckpointManager(store) as manager:
            assert same(manager.load(), state_of(3))
            live = state_of(9)
            assert manager.restore(live).step == 3
            assert same(live, state_of(3))
            print(manager.all_steps(), manager.verify().ok)
        """,
        store,
        coordinator.url,
    )
    assert outputs == ["empty\n[2, 3] True\n"] * 3
    with CheckpointManager(store, read_only=True, rank=1, world_size=3) as evaluator:
        assert evaluator.load()["rank"] == 1


def test_damage_on_one_rank_moves_all_to_an_older_step(coordinator, tmp_path):
    store = tmp_path / "store"
    run(
        """
        with CheckpointManager(store, compression="none") as manager:
            for step in (1, 2):
                manager.save(state_of(step), step=step)
        """,
        store,
        coordinator.url,
    )
    [shard] = store.glob("step-000000000002/rank-00001.*.shard")
    data = bytearray(shard.read_bytes())
    data[10_000] ^= 1
    shard.write_bytes(data)
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            assert same(manager.load(), state_of(1))
            print(manager.last_load.step, [step for step, _ in manager.last_load.fell_back_from])
        """,
        store,
        coordinator.url,
    )
    assert outputs == ["1 []\n", "1 [2]\n", "1 []\n"]


def test_a_rank_that_restarts_alone_fails_the_saves_of_the_others(coordinator, tmp_path):
    store = tmp_path / "store"
    goes_on = start(
        """
        import itertools
        with CheckpointManager(store) as manager:
            manager.save(state_of(1), step=1)
            for step in itertools.count(2):
                try:
                    manager.save(state_of(step), step=step)
                except SaveAborted as error:
                    if "start all ranks again" in str(error):
                        print(error)
                        break
        """,
        store,
        0,
        2,
        coordinator.url,
    )
    is_killed = start(
        """
        with CheckpointManager(store) as manager:
            manager.save(state_of(1), step=1)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        store,
        1,
        2,
        coordinator.url,
    )
    assert is_killed.wait(60) == -signal.SIGKILL
    restarted = start("CheckpointManager(store)", store, 1, 2, coordinator.url)
    out, error = goes_on.communicate(timeout=60)
    assert goes_on.returncode == 0, error
    assert "rank 1 (`worker-1`) has no checkpoint manager open" in out
    restarted.kill()
    restarted.communicate()
    is_killed.communicate()


def test_a_rank_that_restored_what_others_could_not_must_not_save(coordinator, tmp_path):
    store = tmp_path / "store"
    run(
        """
        with CheckpointManager(store, compression="none") as manager:
            manager.save(state_of(1), step=1)
        """,
        store,
        coordinator.url,
    )
    [shard] = store.glob("step-000000000001/rank-00001.*.shard")
    flip_byte(shard, 10_000)
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            live = state_of(9)
            for verb in (manager.restore, manager.load):
                try:
                    verb(live) if verb == manager.restore else verb()
                except (Corrupt, RestoreIncomplete) as error:
                    print(type(error).__name__, "not on every rank" in str(error))
            print(same(live, state_of(1)), same(live, state_of(9)))
            try:
                manager.save(live, step=2)
            except (RestoreIncomplete, SaveAborted) as error:
                print(type(error).__name__)
        """,
        store,
        coordinator.url,
    )
    changed = "RestoreIncomplete True\nCorrupt False\nTrue False\nRestoreIncomplete\n"
    unchanged = "Corrupt False\nCorrupt False\nFalse True\nSaveAborted\n"
    assert outputs == [changed, unchanged, changed]


def test_a_rank_that_gives_up_is_named_on_all(coordinator, tmp_path):
    store = tmp_path / "store"
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            manager.save(state_of(1), step=1)
        with CheckpointManager(store) as manager:
            try:
                manager.load(keys=["no-such" if rank == 1 else "w"])
            except (InvalidArgument, LoadAborted) as error:
                print(type(error).__name__, "rank 1 gave up: loading" in error.why)
            assert same(manager.load(), state_of(1))
        """,
        store,
        coordinator.url,
    )
    others = "LoadAborted True\n"
    assert outputs == [others, "InvalidArgument False\n", others]


def test_ranks_that_see_different_checkpoints_in_one_store_are_refused(coordinator, tmp_path):
    store = tmp_path / "store"
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            manager.save(state_of(1), step=1)
        place = store if rank else store + "-not-mounted"
        with CheckpointManager(place) as manager:
            try:
                manager.load()
            except InvalidArgument as error:
                print(error.why, "mounted everywhere" in error.hint)
        """,
        store,
        coordinator.url,
    )
    few = "the ranks see different ones: this rank has {}, and 2 ranks have some True\n"
    assert outputs == [few.format("none"), *[few.format("steps 1")] * 2]


def test_all_ranks_replace_what_one_of_them_could_not_load(coordinator, tmp_path):
    store = tmp_path / "store"
    run(
        """
        with CheckpointManager(store, compression="none") as manager:
            for step in (10, 20, 30):
                manager.save(state_of(step), step=step)
        """,
        store,
        coordinator.url,
    )
    [shard] = store.glob("step-000000000030/rank-00001.*.shard")
    flip_byte(shard, 10_000)
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            assert manager.load()["step"] == 20
            print([step for step in (20, 25, 30) if manager.should_save(step)])
            for step in (25, 30):
                manager.save(state_of(step), step=step)
            print(manager.all_steps())
            try:
                manager.save(state_of(30), step=30)
            except StepConflict:
                print("conflict")
        with CheckpointManager(store) as manager:
            assert same(manager.load(), state_of(30))
        """,
        store,
        coordinator.url,
    )
    assert outputs == ["[25, 30]\n[10, 20, 25, 30]\nconflict\n"] * 3


def test_another_world_size_continues_with_from_rank(coordinator, tmp_path):
    store = tmp_path / "store"
    run(
        """
        with CheckpointManager(store) as manager:
            manager.save(state_of(1), step=1)
        """,
        store,
        coordinator.url,
    )
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            live = state_of(0)
            for refused in (lambda: manager.load(), lambda: manager.restore(live, step=1)):
                try:
                    refused()
                except InvalidArgument as error:
                    print("3 ranks saved it" in str(error), "from_rank=0" in error.hint)
            assert live["step"] == 0
            print(manager.restore(live, from_rank=2).step, live["rank"])
            manager.save(live, step=2)
            print(manager.all_steps(), manager.load()["rank"])
        """,
        store,
        coordinator.url,
        world_size=2,
    )
    assert outputs == ["True True\nTrue True\n1 2\n[1, 2] 2\n"] * 2
    with CheckpointManager(store, read_only=True) as manager:
        with pytest.raises(InvalidArgument, match="2 ranks saved it"):
            manager.load()
        with pytest.raises(InvalidArgument, match="no rank 2 saved it"):
            manager.load(from_rank=2)
        with pytest.raises(InvalidArgument, match="no rank 4294967295 saved it"):
            manager.load(from_rank=2**40)
        with pytest.raises(InvalidArgument, match="a non-negative int"):
            manager.load(from_rank=-1)
        assert manager.load(step=1, from_rank=1)["rank"] == 1
        [shard] = store.glob("step-000000000002/rank-00001.*.shard")
        shard.write_bytes(shard.read_bytes()[:-1])
        # Step 2 is gone for this rank, and step 1 is of three.
        with (
            CheckpointManager(store, read_only=True, rank=1, world_size=2) as other,
            pytest.raises(InvalidArgument, match=r"3 ranks saved it.*step 2 does not verify"),
        ):
            other.load()


def test_an_unsupported_state_on_one_rank_fails_the_save_on_all(coordinator, tmp_path):
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            state = state_of(1) | ({"bad": lambda: 0} if rank == 1 else {})
            try:
                manager.save(state, step=1)
            except UnsupportedValue as error:
                print("unsupported")
            except SaveAborted as error:
                assert error.is_retryable
                print("rank 1 failed" if "rank 1" in str(error) else str(error))
            manager.save(state_of(2), step=2)
            print(manager.all_steps())
        """,
        tmp_path / "store",
        coordinator.url,
    )
    expected = ["rank 1 failed", "unsupported", "rank 1 failed"]
    assert outputs == [f"{text}\n[2]\n" for text in expected]


def test_a_rank_that_is_killed_fails_the_save_on_the_others(coordinator, tmp_path):
    source = """
        manager = CheckpointManager(store)
        manager.save(state_of(1), step=1)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            manager.save(state_of(2), step=2)
        except SaveAborted as error:
            print("rank 2" in str(error), manager.all_steps())
        manager.close()
    """
    store = tmp_path / "store"
    ranks = [start(source, store, rank, 3, coordinator.url) for rank in range(3)]
    outputs = [process.communicate(timeout=60) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, -signal.SIGKILL], outputs
    assert [out for out, _ in outputs] == ["True [1]\n", "True [1]\n", ""]
    resumed = run(
        """
        with CheckpointManager(store) as manager:
            assert same(manager.load(), state_of(1))
            manager.save(state_of(2), step=2)
            print(manager.all_steps())
        """,
        store,
        coordinator.url,
    )
    assert resumed == ["[1, 2]\n"] * 3
