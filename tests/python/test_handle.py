"""Handles: waiting, awaiting, callbacks and figures."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading

import pytest
import torch

from dtruntime import CheckpointManager, InvalidArgument, SaveInFlight, SaveInfo


def state() -> dict[str, torch.Tensor]:
    return {"weights": torch.randn(2_000_000)}


def test_result_done_and_staged(manager):
    handle = manager.save_async(state(), step=4)
    assert handle.staged.done()
    assert handle.staged.result() is None
    info = handle.result(timeout=60)
    assert isinstance(info, SaveInfo)
    assert handle.done()
    assert handle.exception() is None
    assert handle.result() == info
    assert handle.step == info.step == 4
    assert "step=4" in repr(handle)


def test_timeouts(device, manager):
    weight = device.tensor(torch.ones(100_000)).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    device.hold_copies(True)  # so that the save cannot end
    handle = manager.save_async({"w": weight}, step=1, consistency="overlap", optimizer=optimizer)
    has_ended = manager.wait_until_finished(timeout=0)
    with pytest.raises(TimeoutError) as caught:
        handle.result(timeout=0)
    device.hold_copies(False)
    assert handle.result().step == 1
    assert not has_ended
    assert "hint: " in str(caught.value)
    assert manager.wait_until_finished(timeout=0)


def test_a_save_that_may_not_wait_is_refused_while_another_is_in_flight(device, manager):
    weight = device.tensor(torch.ones(100_000)).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    device.hold_copies(True)  # so that the save cannot end
    handle = manager.save_async({"w": weight}, step=1, consistency="overlap", optimizer=optimizer)
    with pytest.raises(SaveInFlight, match="step 1 is not durable yet") as caught:
        manager.save_async({"w": 1}, step=2, if_busy="raise")
    device.hold_copies(False)
    assert handle.result().step == 1
    assert caught.value.is_retryable
    with pytest.raises(InvalidArgument, match="if_busy"):
        manager.save_async({"w": 1}, step=2, if_busy="skip")
    manager.save_async({"w": 1}, step=3, if_busy="raise").result()
    assert manager.all_steps() == [1, 3]


def test_figures(manager):
    handle = manager.save_async(state(), step=1)
    info = handle.result()
    progress, stats = handle.progress(), handle.stats()
    assert progress.raw_bytes == progress.captured_bytes == progress.encoded_bytes == 8_000_000
    assert 0 < progress.written_bytes <= info.stored_bytes
    assert stats == info.stats
    assert 0 < stats.capture_seconds <= stats.stall_seconds <= stats.durable_seconds
    assert stats.raw_bytes == 8_000_000
    assert stats.chunks == -(-8_000_000 // 65536)
    assert stats.io_backend == manager.io_backend


def test_callbacks_run_once_on_one_thread_in_order(manager):
    seen = []
    done = threading.Event()

    def callback(name):
        return lambda handle: seen.append((name, handle.step, threading.current_thread().name))

    first = manager.save_async(state(), step=1)
    first.add_done_callback(callback("a"))
    first.add_done_callback(lambda _: 1 / 0)  # is logged, and stops nothing else
    first.add_done_callback(callback("b"))
    second = manager.save_async(state(), step=2)
    second.result()
    second.add_done_callback(callback("late"))
    second.add_done_callback(lambda _: done.set())
    assert done.wait(60)
    assert [(name, step) for name, step, _ in seen] == [("a", 1), ("b", 1), ("late", 2)]
    assert {thread for _, _, thread in seen} == {"dtruntime-watcher"}


def test_a_failing_callback_is_logged(manager, caplog):
    handle = manager.save_async(state(), step=1)
    done = threading.Event()
    handle.add_done_callback(lambda _: 1 / 0)
    handle.add_done_callback(lambda _: done.set())
    assert done.wait(60)
    assert "done callback of the save of step 1 failed" in caplog.text


def test_a_callback_that_exits_stops_no_other_callback(manager, caplog):
    done = threading.Event()
    handle = manager.save_async(state(), step=1)
    handle.add_done_callback(lambda _: sys.exit(3))
    handle.add_done_callback(lambda _: sys.exit(3))
    later = manager.save_async(state(), step=2)
    later.add_done_callback(lambda _: done.set())
    assert asyncio.run(asyncio.wait_for(later.wait(), 60)).step == 2
    assert done.wait(60)
    assert "done callback of the save of step 1 failed" in caplog.text


class LineLogger:
    """What some programs replace standard error with."""

    def write(self, text: str) -> None:
        """Take a line."""


class BrokenPipe:
    """A standard error whose reader has closed the pipe."""

    def isatty(self) -> bool:
        return True

    def write(self, _text: str) -> None:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [LineLogger, BrokenPipe])
def test_an_unwritable_progress_bar_stops_no_announcement(open_manager, monkeypatch, stream):
    manager = open_manager(progress=True)
    monkeypatch.setattr(sys, "stderr", stream())
    done = threading.Event()
    manager.save_async(state(), step=1).result()
    handle = manager.save_async(state(), step=2)
    handle.add_done_callback(lambda _: done.set())
    assert asyncio.run(asyncio.wait_for(handle.wait(), 60)).step == 2
    assert done.wait(60)


def test_an_upload_whose_outcome_is_unknown_is_announced(manager):
    handle = manager.save_async(state(), step=1)

    class Native:
        def uploaded(self, step: int, _seconds: float) -> None:
            raise RuntimeError(f"step {step} is unheard of")

    handle.result()
    handle.uploaded = concurrent.futures.Future()
    handle._follow_upload(manager._opened.watcher, Native())
    with pytest.raises(RuntimeError, match="unheard of"):
        handle.uploaded.result(timeout=60)


def test_a_callback_may_close_the_manager(manager):
    done = threading.Event()

    def close(_handle):
        manager.close()
        done.set()

    manager.save_async(state(), step=1).add_done_callback(close)
    assert done.wait(60)
    assert "closed" in repr(manager)


def test_await(manager):
    async def main():
        info = await manager.save_async(state(), step=1)
        again = await manager.save_async(step=2, state=state())
        both = await asyncio.gather(
            manager.save_async(state(), step=3), manager.save_async(state(), step=4)
        )
        task = asyncio.create_task(manager.save_async(state(), step=5).wait())
        limited = await asyncio.wait_for(manager.save_async(state(), step=6), timeout=60)
        return [info, again, *both, await task, limited]

    assert [info.step for info in asyncio.run(main())] == [1, 2, 3, 4, 5, 6]
    assert asyncio.run(manager.save_async(state(), step=7).wait()).step == 7


def test_the_event_loop_runs_while_a_save_is_awaited(manager):
    async def main():
        handle = manager.save_async({"weights": torch.randn(8_000_000)}, step=1)
        turns = 0

        async def count():
            nonlocal turns
            while not handle.done():
                turns += 1
                await asyncio.sleep(0)

        await asyncio.gather(handle, count())
        return turns

    assert asyncio.run(main()) > 1


def test_cancelling_a_wait_does_not_cancel_the_save(manager):
    async def main():
        handle = manager.save_async({"weights": torch.randn(8_000_000)}, step=1)
        task = asyncio.ensure_future(handle.wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        first = await asyncio.gather(asyncio.wait_for(handle, 60))
        return first[0], await handle

    first, second = asyncio.run(main())
    assert first.step == second.step == 1
    assert manager.all_steps() == [1]


def test_a_callback_added_after_the_manager_was_closed_runs_at_once(open_manager):
    manager = open_manager()
    handle = manager.save_async({"weight": torch.ones(3)}, step=1)
    manager.close()
    called = []
    handle.add_done_callback(called.append)
    assert called == [handle]


def test_the_stall_includes_waiting_and_flattening(tmp_path):
    state = {"w": torch.zeros(3_000_000), "many": [torch.zeros(2) for _ in range(2000)]}
    with CheckpointManager(tmp_path) as manager:
        first = manager.save_async(state, step=1)
        second = manager.save_async(state, step=2)
        for stats in (first.result().stats, second.result().stats):
            parts = stats.wait_seconds + stats.prepare_seconds + stats.capture_seconds
            assert stats.prepare_seconds > 0
            assert parts <= stats.stall_seconds
        assert second.stats().wait_seconds > 0
