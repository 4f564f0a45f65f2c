"""The rows of `make torture`: each promise, the test that holds it, and how often it is tried.

A row is one command that tries some of its numbered states and says what it did. What a command
gets and what it prints is in `torture.py`; a new row is an entry of `ROWS` here and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Row:
    """One promise."""

    name: str
    """Short, unique: the key in the record, and what `--rows` takes."""
    promise: str
    test: str
    """What readers search for: the name of the test."""
    command: tuple[str, ...]
    unit: str
    """What is counted, in the plural."""
    full: int
    """How many make the row complete; more than there are means all of them."""
    batch: int
    """How many the first time; later as many as fit into the row's slice of time."""
    prepare: tuple[str, ...] = ()
    """Run once before the clock starts: builds."""
    environment: dict[str, str] = field(default_factory=dict)
    limit_seconds: float = 1800.0
    """A command that takes longer is ended and counts as a violation."""


def crash_test(  # noqa: PLR0917
    name: str, promise: str, test: str, unit: str, full: int, batch: int
) -> Row:
    """Make the row of a test of the binary `crash`, which counts by `tests/crash/budget.rs`."""
    cargo = ("cargo", "test", "--locked", "--release", "--workspace", "--test", "crash")
    return Row(
        name=name,
        promise=promise,
        test=test.rsplit("::", maxsplit=1)[-1],
        command=(*cargo, "--", test, "--exact", "--nocapture"),
        unit=unit,
        full=full,
        batch=batch,
        prepare=(*cargo, "--no-run"),
    )


def of_binary(binary: str, row: Row) -> Row:
    """Make the row of a test of another binary, which counts as `crash` does."""
    return replace(
        row,
        command=tuple(binary if word == "crash" else word for word in row.command),
        prepare=tuple(binary if word == "crash" else word for word in row.prepare),
    )


def reader_test(name: str, promise: str, test: str, unit: str, full: int, batch: int) -> Row:  # noqa: PLR0917
    """Make the row of a test of the binary `readers`."""
    return of_binary("readers", crash_test(name, promise, test, unit, full, batch))


def flat_test(backend: str) -> Row:
    """Make the row of saves in one process, which must not grow."""
    test = f"flat::two_hundred_saves_leave_memory_descriptors_and_threads_flat_on_{backend}"
    row = crash_test(
        f"flat-{backend}", "memory, descriptors, threads flat", test, "saves", 5_000, 5_000
    )
    return of_binary("engine", row)


def fuzzer(target: str) -> Row:
    """Make the row of a fuzz target: an hour of it."""
    command = ("python", "tests/fuzz/fuzz.py", target)
    return Row(
        name=f"fuzz-{target}",
        promise="readers are total",
        test=f"tests/fuzz/targets/{target}.rs",
        command=command,
        unit="seconds of fuzzing",
        full=3600,
        batch=30,
        prepare=("env", "DTR_TORTURE_STATES=1", *command),
    )


def checker(name: str, what: str) -> Row:
    """Make the row of a checker that runs tests once."""
    return Row(
        name=name,
        promise="unsafe code is clean",
        test=what,
        command=("python", "tests/torture/checked.py", name),
        unit="runs",
        full=1,
        batch=1,
        limit_seconds=3600.0,
    )


ROWS: tuple[Row, ...] = (
    crash_test(
        "kill",
        "what was acknowledged survives kill -9, and nothing torn is visible",
        "kill::an_acknowledged_checkpoint_survives_kill_9",
        # One process is killed at a named point and the next one at a random time.
        "pairs of SIGKILLs",
        10_000,
        200,
    ),
    crash_test(
        "power",
        "... survives power loss: ext4 shut down at every operation, three devices",
        "power_cut::an_acknowledged_checkpoint_survives_a_power_cut",
        "cuts",
        10_500,
        50,
    ),
    crash_test(
        "reorder",
        "any legal reordering or tearing recovers",
        "power_loss::any_legal_reordering_or_tearing_recovers",
        "states",
        1_000_000,
        5_000,
    ),
    crash_test(
        "reorder-after-kill",
        "... also after a process was killed and another one continued",
        "power_loss::a_power_loss_after_a_process_was_killed_recovers",
        "states",
        100_000,
        2_000,
    ),
    crash_test(
        "failure",
        "any single I/O failure leaves the checkpoint before and gives a typed error",
        "one_failure::any_single_failure_leaves_the_checkpoint_before_and_is_typed",
        "failures",
        100_000,
        2_000,
    ),
    crash_test(
        "sync",
        "nothing is acknowledged after a failed sync",
        "failed_sync::nothing_is_acknowledged_after_a_failed_sync",
        "devices",
        500,
        10,
    ),
    crash_test(
        "full",
        "a full disk is harmless",
        "full_disk::a_full_disk_is_harmless",
        "disks",
        10_000,
        32,
    ),
    crash_test(
        "bits",
        "every flipped bit is found before a tensor is returned",
        "damage::every_flipped_bit_is_found_before_a_tensor_is_returned",
        "bits",
        500_000,
        20_000,
    ),
    crash_test(
        "truncations",
        "every truncation is found",
        "damage::every_truncation_is_found_before_a_tensor_is_returned",
        "lengths",
        100_000,
        2_000,
    ),
    reader_test(
        "bombs",
        "a small file that asks for much is refused",
        "bombs::a_small_file_that_asks_for_much_is_refused",
        "bombs",
        200,
        50,
    ),
    reader_test(
        "escape",
        "no name and no link leads out of the store",
        "escape::no_name_and_no_link_leads_out_of_the_store",
        "attacks",
        1_000,
        100,
    ),
    reader_test(
        "replay",
        "readers are total: the corpus, changed at random, on a stable compiler",
        "replay::random_inputs_are_read_or_refused",
        "inputs for each target",
        100_000,
        2_000,
    ),
    of_binary(
        "s3",
        crash_test(
            "s3-faults",
            "a bucket: one fault at any request loses nothing",
            "faults::one_fault_at_any_request_loses_nothing",
            "faults",
            10_000,
            60,
        ),
    ),
    of_binary(
        "s3",
        crash_test(
            "s3-uploads",
            "... nor at any request of an upload behind a directory",
            "faults::one_fault_at_any_request_of_an_upload_behind_loses_nothing",
            "faults",
            10_000,
            30,
        ),
    ),
    of_binary(
        "s3",
        crash_test(
            "s3-schedules",
            "... and whatever fails, how often: nothing wrong is visible",
            "faults::whatever_the_schedule_nothing_wrong_is_visible",
            "schedules",
            500,
            24,
        ),
    ),
    of_binary(
        "ranks",
        crash_test(
            "ranks",
            "several ranks: whatever is lost, a checkpoint is complete or not there",
            "schedules::whatever_is_lost_a_checkpoint_is_complete_or_not_there",
            "schedules of six saves",
            500,
            8,
        ),
    ),
    of_binary(
        "simulation",
        crash_test(
            "job",
            "one manifest a step, epochs never go back, barriers neither early nor endless, "
            "who was fenced changes nothing",
            "seeds",
            "histories",
            10_000,
            200,
        ),
    ),
    of_binary(
        "program",
        crash_test(
            "coordinator-kill",
            "a coordinator that is killed under 64 workers loses nothing",
            "kills_lose_nothing",
            "SIGKILLs",
            50,
            12,
        ),
    ),
    Row(
        name="network",
        promise="a network that breaks between two machines costs saves and nothing else",
        test="test_a_network_that_breaks_costs_saves_and_nothing_else",
        command=("pytest", "-q", "-s", "tests/python/test_networks.py", "-k", "breaks"),
        unit="rounds of 18 breaks",
        full=20,
        batch=1,
    ),
    *(fuzzer(target) for target in ("block", "codec", "frame", "index", "manifest", "names")),
    flat_test("uring"),
    flat_test("threads"),
    checker("loom", "models:: of the engine"),
    checker("miri", "buffers, byte planes"),
    checker("address", "the engine's tests"),
    checker("thread", "the engine's tests"),
    Row(
        name="mutants",
        promise="the campaign itself works: each mutant of the engine is caught by its test",
        test="tests/mutants/mutants.py",
        command=("python", "tests/mutants/mutants.py"),
        unit="mutants",
        full=100,
        batch=1,
        limit_seconds=3600.0,
    ),
)
