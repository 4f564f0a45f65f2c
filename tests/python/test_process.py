"""What outlives a call: fork, DataLoader workers, interpreter exit, SIGTERM and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import warnings

import pytest
import torch
from support import assert_same, run_script, start_script

from dtruntime import CheckpointManager, CheckpointNotFound, Closed, _native, errors, lifecycle

PREAMBLE = """
import logging, os, sys, signal, threading, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from dtruntime import CheckpointManager
store = sys.argv[1]
manager = CheckpointManager(store, compression="gzip")  # slow enough to be interrupted
state = {"weights": torch.randn(12_000_000)}
"""


def steps_of(store) -> list[int]:
    with CheckpointManager(store, read_only=True) as reader:
        return reader.all_steps()


FORK = """
manager.save({"small": 1}, step=1)
handle = manager.save_async(state, step=2)
child = os.fork()
if child == 0:
    code = 0
    for verb in (handle.done, handle.result, manager.latest_step, manager.load,
                 manager.wait_until_finished, lambda: manager.save_async({}, step=9)):
        try:
            verb()
            code = 1
        except Exception as error:
            if type(error).__name__ != "Closed" or "hint: " not in str(error):
                code = 2
    manager.close()
    evaluator = CheckpointManager(store, read_only=True)
    if evaluator.load(step=1) != {"small": 1}:
        code = 3
    del handle, manager, evaluator
    import gc; gc.collect()
    os._exit(code)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("step", handle.result().step)
print("verified", manager.verify(2).ok)
"""


def test_fork_during_a_save(store):
    done = run_script(PREAMBLE + FORK, store)
    assert done.stdout.split() == ["child", "0", "step", "2", "verified", "True"], done.stderr


def test_a_forked_child_does_not_hold_the_store(store):
    done = run_script(
        PREAMBLE
        + """
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.close(write)
    os.read(read, 1)  # lives on until the parent has opened the store again
    os._exit(0)
os.close(read)
manager.close()
CheckpointManager(store).save({"again": 1}, step=1)
print("opened again")
os.close(write)
os.waitpid(child, 0)
""",
        store,
    )
    assert done.stdout == "opened again\n", done.stderr


def test_multiprocessing_by_fork(store):
    done = run_script(
        PREAMBLE
        + """
import multiprocessing
handle = manager.save_async(state, step=1)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(abs, [-1, -2]))
print(handle.result().step)
""",
        store,
    )
    assert done.stdout.split("\n")[:2] == ["[1, 2]", "1"], done.stderr


def test_data_loader_workers_beside_a_save(manager):
    data = torch.utils.data.TensorDataset(torch.arange(64))
    loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=2)
    state = {"weights": torch.randn(4_000_000)}
    handle = manager.save_async(state, step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
        batches = [batch for (batch,) in loader]
    handle.result()
    assert torch.equal(torch.cat(batches), torch.arange(64))
    assert_same(manager.load(), state)


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "del manager",
        "sys.exit(0)",
        "raise SystemExit(0)",
        "import atexit; atexit.register(print, 'bye')",
    ],
    ids=["end", "dropped", "exit", "system exit", "exit handlers"],
)
def test_exit_finishes_the_save_in_flight(store, ending):
    done = run_script(PREAMBLE + "manager.save_async(state, step=1)\n" + ending, store)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert steps_of(store) == [1]


def test_exit_with_an_error_finishes_the_save_in_flight(store):
    done = run_script(PREAMBLE + "manager.save_async(state, step=1)\n1 / 0", store)
    assert done.returncode == 1
    assert steps_of(store) == [1]


def test_a_long_exit_says_what_it_waits_for(store):
    done = run_script(
        PREAMBLE.replace("12_000_000", "40_000_000") + "manager.save_async(state, step=7)", store
    )
    assert "exit is waiting for the save of step 7" in done.stderr
    assert steps_of(store) == [7]


def test_saving_in_an_exit_handler(store):
    done = run_script(
        PREAMBLE + "import atexit\natexit.register(lambda: manager.save_async({'a': 1}, step=3))",
        store,
    )
    assert done.stderr == ""
    assert steps_of(store) == [3]


TERMINATION = """
import signal
signal.signal(signal.SIGTERM, lambda *_: print("previous handler ran", flush=True) or sys.exit(5))
manager.close()
deadline = float(sys.argv[3])
manager = CheckpointManager(
    store, compression="gzip", sigterm=sys.argv[2], sigterm_deadline_seconds=deadline
)
handle = manager.save_async(state, step=1)
os.kill(os.getpid(), signal.SIGTERM)
print("not reached")
"""


@pytest.mark.parametrize(
    ("mode", "deadline", "steps", "message"),
    [
        ("finish", 60, [1], "step 1 is durable"),
        ("drop", 60, [], "dropped the save of step 1"),
        ("finish", 0.01, [], "dropped the save of step 1"),
    ],
)
def test_sigterm(store, mode, deadline, steps, message):
    done = run_script(PREAMBLE + TERMINATION, store, mode, deadline)
    assert done.returncode == 5, done.stderr
    assert done.stdout == "previous handler ran\n"
    assert message in done.stderr
    assert steps_of(store) == steps
    assert not [path for path in store.rglob("*.shard") if not steps], (
        "a dropped save leaves no file"
    )


def test_sigterm_without_a_previous_handler_kills(store):
    script = TERMINATION.replace("signal.signal(", "(lambda *_: 0)(")
    done = run_script(PREAMBLE + script, store, "finish", 60)
    assert done.returncode == -signal.SIGTERM
    assert steps_of(store) == [1]


def test_sigterm_during_the_snapshot_waits_for_the_handle(store):
    script = TERMINATION.replace(
        "handle = manager.save_async",
        """
class Native:  # the signal arrives while the native half takes the snapshot
    def __init__(self, native):
        self.native = native

    def __getattr__(self, name):
        return getattr(self.native, name)

    def save(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return self.native.save(*arguments)

manager._opened.saver._native = Native(manager._opened.native)
handle = manager.save_async""",
    )
    done = run_script(PREAMBLE + script, store, "finish", 60)
    assert done.returncode == 5, done.stderr
    assert "step 1 is durable" in done.stderr
    assert steps_of(store) == [1]


def test_a_handler_that_cannot_be_installed_leaves_the_store_free(store):
    raised = []

    def open_in_thread():
        try:
            CheckpointManager(store, sigterm="finish")
        except errors.InvalidArgument as error:
            raised.append(error)

    thread = threading.Thread(target=open_in_thread)
    thread.start()
    thread.join()
    assert "only from the main thread" in raised[0].why
    assert not store.exists(), "it is refused before the store is opened"
    CheckpointManager(store).close()


def test_sigterm_is_left_alone_unless_asked_for(open_manager):
    before = signal.getsignal(signal.SIGTERM)
    manager = open_manager()
    assert signal.getsignal(signal.SIGTERM) is before
    with open_manager(manager.path.with_name("other"), sigterm="drop"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_ends_a_wait_and_not_the_save(store):
    process = start_script(
        PREAMBLE
        + """
handle = manager.save_async(state, step=1)
try:
    print("waiting", flush=True)
    handle.result()
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(handle.result().step)
""",
        store,
    )
    assert process.stdout.readline() == "waiting\n"
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out in ("interrupted\n1\n", "1\n"), err
    assert steps_of(store) == [1]


def test_a_save_in_a_handler_that_interrupts_a_save_is_refused(store):
    done = run_script(
        PREAMBLE
        + """
import dtruntime
def save(*_):
    try:
        manager.save({"small": 2}, step=2)
    except dtruntime.InvalidArgument as error:
        print(error.hint)

class Native:  # the signal arrives while the native half takes the snapshot
    def __init__(self, native):
        self.native = native

    def __getattr__(self, name):
        return getattr(self.native, name)

    def save(self, *arguments):
        if arguments[0][0] == 1:
            signal.raise_signal(signal.SIGUSR1)
        return self.native.save(*arguments)

signal.signal(signal.SIGUSR1, save)
manager._opened.saver._native = Native(manager._opened.native)
handle = manager.save_async({"small": 1}, step=1)
print(handle.result().step)
signal.raise_signal(signal.SIGUSR1)
print(manager.all_steps())
""",
        store,
        timeout=30,
    )
    hint, *rest = done.stdout.splitlines()
    assert "set a flag in the handler" in hint, done.stderr
    assert "`sigterm=" in hint
    assert rest == ["1", "[1, 2]"]


class Interrupted:
    """A native manager whose `save` succeeds, but Ctrl-C interrupts its return."""

    def __init__(self, native) -> None:
        self._native = native

    def __getattr__(self, name: str):
        return getattr(self._native, name)

    def save(self, *arguments):
        self._native.save(*arguments)
        raise KeyboardInterrupt


def test_a_save_after_ctrl_c_works(open_manager, store):
    manager = open_manager(compression="gzip")  # slow enough to be abandoned
    state = {"weights": torch.randn(1_000_000)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager._opened.saver, "_native", Interrupted(manager._opened.native))
        with pytest.raises(KeyboardInterrupt):
            manager.save_async(state, step=1)
    assert manager.save(state, step=2).step == 2
    manager.close()
    assert steps_of(store) == [2]


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["wait", "stop", "close"])
def test_closing_resumes_after_ctrl_c(open_manager, store, where):
    manager = open_manager()
    manager.save_async({"small": 1}, step=1)
    with pytest.MonkeyPatch.context() as patch:
        if where in ("wait", "stop"):  # Ctrl-C, and once more while the first one is handled
            patch.setattr(manager._opened.watcher, "stop", interrupt)
        if where == "close":
            patch.setattr(lifecycle, "unregister", interrupt)
        with pytest.raises(KeyboardInterrupt):
            manager.close()
        assert "closed" not in repr(manager)
        with pytest.raises(Closed):
            manager.save_async({"small": 2}, step=2)
    manager.close()
    assert "closed" in repr(manager)
    with CheckpointManager(store) as again:
        assert again.all_steps() == [1]


@pytest.mark.parametrize("where", ["register", "start"])
def test_an_opening_that_ctrl_c_ends_leaves_nothing_behind(open_manager, where):
    before = set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch:
        if where == "register":
            patch.setattr(lifecycle, "register", interrupt)
        else:
            start = threading.Thread.start
            patch.setattr(threading.Thread, "start", lambda t: (start(t), interrupt()))
        with pytest.raises(KeyboardInterrupt) as caught:
            open_manager()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive(), caught
    assert open_manager().all_steps() == []  # nothing holds the store


@pytest.mark.parametrize("made", ["error", "coordinator error"])
def test_ctrl_c_while_an_error_is_created_propagates(open_manager, monkeypatch, made):
    manager = open_manager()
    if made == "error":
        monkeypatch.setattr(errors, "CheckpointNotFound", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            manager.load(step=7)
    else:
        monkeypatch.setattr(errors, "InvalidArgument", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            _native.Coordinator("no url", None, (None, None, None), 1.0)


class Interrupting(CheckpointNotFound):
    """An exception whose creation Ctrl-C interrupts."""

    def __init__(self, *_) -> None:
        raise KeyboardInterrupt


def test_importing_needs_no_torch(store):
    done = run_script(
        """
import sys
sys.modules["torch"] = None  # as if it were not installed
import numpy as np, dtruntime
manager = dtruntime.CheckpointManager(sys.argv[1])
manager.save({"array": np.arange(5), "step": 1}, step=1)
state = manager.load()
assert np.array_equal(state["array"], np.arange(5))
manager.restore(state)
""",
        store,
    )
    assert done.returncode == 0, done.stderr
