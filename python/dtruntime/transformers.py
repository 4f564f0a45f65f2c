"""Adapter for Hugging Face's ``Trainer``: its checkpoints, in a manager's store.

>>> from dtruntime.transformers import Trainer
>>> with CheckpointManager("runs/tuned", keep_last_n=3) as manager:
...     trainer = Trainer(model, args, train_dataset=dataset, manager=manager)
...     trainer.train(resume_from_checkpoint=manager.latest_step() is not None)

A checkpoint has ``model``, ``optimizer``, ``scheduler`` and ``scaler``; ``random``, the random
number generators of each rank; and ``trainer``, the trainer's own state as JSON.

Always holds: model, optimizer and position are resumed from the same checkpoint; nothing else is
written that ``transformers`` would read separately.

The trainer has no plugin interface for this, so private methods of it are overridden; a version
that lacks one of them is refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from transformers.trainer_callback import ExportableState

from dtruntime import settings
from dtruntime.checkpoint import CheckpointManager
from dtruntime.errors import (
    CheckpointError,
    CheckpointNotFound,
    Corrupt,
    InvalidArgument,
    LoadAborted,
    StepConflict,
    UnsupportedFormat,
)
from dtruntime.opened import opened_by
from dtruntime.ranks import launch

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

__all__ = ["StoredCheckpoints", "Trainer"]

_logger = logging.getLogger("dtruntime")

_OVERRIDDEN = (
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_scaler",
    "_save_checkpoint",
)


_HINT_OF_MISFIT = (
    "resume with the same model, optimizer and `trainable_only` as when it was saved; to only take "
    "the weights that fit, call `manager.restore({'model': model}, strict=False)` and start a "
    "training in another store"
)


class StoredCheckpoints(_Base):  # type: ignore[misc]
    """A mixin that makes subclasses of ``Trainer`` save to, and resume from, a manager.

    ``TrainingArguments`` determine when to save (``save_strategy``, ``save_steps``), the manager
    which checkpoints to keep (``keep_last_n``, ``best_metric="eval_loss"``). Training continues
    while a checkpoint is written; leave the manager's block to wait for the last one.

    With several ranks, each opens the manager, with ``replicated=["model.*", "optimizer.*",
    "scheduler.*", "scaler.*"]``.

    Args:
        manager: Where checkpoints are saved. ``resume_from_checkpoint`` is True for the newest that
            verifies, or a step; a path is resumed from as ``transformers`` does.
        trainable_only: Whether frozen parameters are left out of checkpoints, for example when
            training adapters. Buffers are kept.

    Raises:
        InvalidArgument: ``TrainingArguments`` ask for something that the manager handles
            differently, or for DeepSpeed or FSDP1, which keep their own states.
        UnsupportedFormat: This version of ``transformers`` is not supported.

    >>> from trl import SFTTrainer
    >>> class StoredSFTTrainer(StoredCheckpoints, SFTTrainer): ...

    """

    def __init__(
        self,
        *args: Any,
        manager: CheckpointManager,
        trainable_only: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_version(super())
        _check_manager(manager)
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        if given is not None:  # before a repository is created on the hub
            _check_arguments(given)
            _check_retention(given, manager)
        super().__init__(*args, **kwargs)
        _check_strategy(self)
        self._manager = manager
        opened_by(manager).lineage.rewinds_implicitly = True  # see `rewind` below
        self._trainable_only = bool(trainable_only)
        self._resumed: tuple[str, int] | None = None  # the stand-in for a directory, and the step
        self._random: dict[str, Any] | None = None  # of the checkpoint that is resumed from
        self._newest: int | None = None  # up to this step, a save may replace another
        self._best: int | None = None  # the best that was saved

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as ``transformers`` does, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: True for the newest checkpoint that verifies, or a step.
            trial: None: a hyperparameter search needs a store for each trial.
            args: As for ``transformers``.
            kwargs: The same.

        Raises:
            CheckpointNotFound: There is none, or none of this step.
            Corrupt: The given step is damaged, or all steps are.
            StepConflict: It would start from the beginning, and there are checkpoints already.

        >>> trainer.train(resume_from_checkpoint=True)

        """
        if trial is not None:
            raise InvalidArgument(
                "a hyperparameter search with a manager",
                "each trial starts at step 0 again",
                "search with the `Trainer` of transformers",
            )
        self._manager.wait_until_finished()
        known = self._manager.all_steps()
        self._resumed = self._random = self._newest = self._best = None
        target = _target_of(resume_from_checkpoint)
        if target is False or isinstance(target, str):
            self._check_empty(known)
            return super().train(target or None, None, *args, **kwargs)
        self._newest = max(known, default=None)
        step = None if target is True else target
        while True:
            try:
                step, trainer_state = self._position(step)
            except Corrupt as error:
                if target is not True or step is None:
                    raise
                step = self._older(step, error)
                continue
            with tempfile.TemporaryDirectory() as directory:
                # The trainer reads this file itself, before and after it calls our methods.
                Path(directory, "trainer_state.json").write_text(trainer_state, encoding="utf-8")
                self._resumed = (directory, step)
                try:
                    return super().train(directory, None, *args, **kwargs)
                except _Damaged as damaged:
                    if target is not True:
                        raise damaged.error from None
                    step = self._older(step, damaged.error)
                    self._unhook()

    def _check_empty(self, known: list[int]) -> None:
        if known and self.args.save_strategy != "no":
            raise StepConflict(
                f"starting a training with checkpoints in `{self._manager.path}`",
                f"the store already has checkpoints, up to step {known[-1]}",
                "pass `resume_from_checkpoint=True` to continue from the newest, or use another "
                "store",
            )

    def _position(self, step: int | None) -> tuple[int, str]:
        """Return the step of a checkpoint, and the trainer's state when it was saved."""
        state = self._manager.load(step, keys="trainer", from_rank=0, strict=False)
        found = self._manager.last_load
        assert found is not None  # noqa: S101  (it was loaded just now)
        if "trainer" not in state:
            raise InvalidArgument(
                f"resuming from step {found.step} in `{self._manager.path}`",
                "it was not saved by a Trainer",
                "call `manager.restore({'model': model})` before training to take only the weights",
            )
        self._best = state["trainer"]["best"]
        return found.step, state["trainer"]["state"]

    def _older(self, step: int, error: Corrupt) -> int:
        """Return the newest step before a damaged one; raise ``error`` if there is none."""
        older = [known for known in self._manager.all_steps() if known < step]
        if not older:
            raise error
        _logger.warning("step %d is damaged, trying step %d: %s", step, older[-1], error)
        return older[-1]

    def _unhook(self) -> None:
        """Remove the hook that the failed attempt to train has added to the model."""
        hook = getattr(self, "neftune_hook_handle", None)
        if hook is not None:
            hook.remove()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002
        self.store_flos()
        step = self.state.global_step
        self._note_best(step)
        live = self._live()
        consistency = opened_by(self._manager).options.consistency
        callbacks = [*self.callback_handler.callbacks, self.control]
        trainer_state = {"state": _text_of(self.state, callbacks), "best": self._best}
        self._manager.save_async(
            {**live, "random": _random_state(), "trainer": trainer_state},
            step,
            # The step may go back: resumed from an older step, restarted with smaller batches, or
            # the same step once more.
            rewind=self._newest is not None and step <= self._newest,
            metadata=_metrics_of(self.state),
            optimizer=live["optimizer"] if consistency == "overlap" else None,
        )
        self._newest = max(step, self._newest or 0)

    def _note_best(self, *saved: int) -> None:
        """Set the trainer's best checkpoint, which it would otherwise look for as a directory."""
        best = self.state.best_global_step
        # The store is listed only if another checkpoint has become the best.
        if best not in {None, self._best} and (best in saved or best in self._manager.all_steps()):
            self._best = best
        if self._best is not None:
            self.state.best_model_checkpoint = f"step {self._best}"

    def _live(self) -> dict[str, Any]:
        """Return the state that every rank saves, and restores in place."""
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        state = {
            "model": _trainable(self.model) if self._trainable_only else self.model,
            "optimizer": optimizer.optimizer
            if isinstance(optimizer, AcceleratedOptimizer)
            else optimizer,
            "scheduler": scheduler.scheduler
            if isinstance(scheduler, AcceleratedScheduler)
            else scheduler,
        }
        scaler = getattr(self.accelerator, "scaler", None)
        return state if scaler is None else {**state, "scaler": scaler}

    def _is_ours(self, checkpoint: str | None) -> bool:
        return self._resumed is not None and checkpoint == self._resumed[0]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._is_ours(resume_from_checkpoint):  # ours comes with the optimizer
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._is_ours(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self._resumed is not None  # noqa: S101
        error: CheckpointError | None = None
        try:
            self._manager.restore(self._live(), self._resumed[1])
            self._random = self._own_random(self._resumed[1])
        except InvalidArgument as found:
            error = InvalidArgument(found.what, found.why, _HINT_OF_MISFIT)
        except CheckpointError as found:
            error = found
        _agree(error)
        self._note_best()

    def _own_random(self, step: int) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = self._manager.load(step, keys="random")["random"]
        except InvalidArgument as error:  # another number of ranks saved it
            _logger.warning("random number generators are not restored: %s", error.why)
            return None
        return state

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not self._is_ours(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self._is_ours(checkpoint):
            super()._load_rng_state(checkpoint)
        elif self._random is not None:
            _set_random_state(self._random)

    def _load_best_model(self) -> None:
        self._manager.wait_until_finished()
        metric, mode = _best_of(self.args)
        step = self._best
        if step not in self._manager.all_steps():
            # Of equally good ones the trainer picks the first, and retention keeps the last.
            step = self._manager.best_step(metric, mode)
        if step != self._best and self._manager.metadata(step)[metric] != self.state.best_metric:
            raise CheckpointNotFound(
                f"loading the best model, of step {self._best}, from `{self._manager.path}`",
                "it was not kept",
                f'open the manager with `keep_best_n=1, best_metric="{metric}", '
                f'best_mode="{mode}"`',
            )
        self._manager.restore({"model": self._live()["model"]}, step)


class Trainer(StoredCheckpoints, transformers.Trainer):  # type: ignore[misc]
    """The ``Trainer`` of ``transformers`` with the checkpoints of a manager.

    >>> trainer = Trainer(model, args, train_dataset=dataset, manager=manager)
    """


class _Damaged(Exception):  # noqa: N818  (never seen outside)
    """Ends an attempt to resume."""

    def __init__(self, error: Corrupt) -> None:
        super().__init__(str(error))
        self.error = error


def _agree(error: CheckpointError | None) -> None:
    """Raise an error of one rank on all of them: all fall back to the same checkpoint, or end."""
    group = launch.process_group()
    errors: list[tuple[str, bool] | None] = [None]
    if group is not None and group.world_size > 1:
        errors *= group.world_size
        own = None if error is None else (str(error), isinstance(error, Corrupt))
        torch.distributed.all_gather_object(errors, own)
    others = [(rank, *found) for rank, found in enumerate(errors) if found is not None]
    if error is None and others:
        rank, text, is_damage = min(others, key=lambda other: other[2])  # other errors come first
        kind = Corrupt if is_damage else LoadAborted
        hint = "see the error of that rank"
        error = kind(f"restoring on rank {rank}", text.partition("\nhint: ")[0], hint)
    if isinstance(error, Corrupt) and all(is_damage for _, _, is_damage in others):
        raise _Damaged(error)
    if error is not None:
        raise error


def _target_of(given: Any) -> bool | int | str:
    """Return False for the beginning, True for the newest checkpoint, a step, or a path."""
    if given is None or isinstance(given, (bool, np.bool_)):
        return bool(given)
    if not isinstance(given, (os.PathLike, str)):
        return settings.integer("resume_from_checkpoint", given)
    text = os.fspath(given)
    if os.path.exists(text):  # noqa: PTH110
        return text
    # As from a command line.
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    return int(text) if text.isdecimal() else text


def _best_of(args: Any) -> tuple[str, str]:
    """Return the metric that ranks checkpoints, and whether smaller or larger is better."""
    name = args.metric_for_best_model or "loss"
    metric = name if name.startswith("eval_") else f"eval_{name}"
    return metric, "max" if args.greater_is_better else "min"


def _check_manager(manager: Any) -> None:
    what = "a Trainer's `manager`"
    if not isinstance(manager, CheckpointManager):
        raise InvalidArgument(
            what, f"it is a `{type(manager).__name__}`", "pass a `dtruntime.CheckpointManager`"
        )
    if opened_by(manager).options.read_only:
        raise InvalidArgument(what, "it is read-only", "open it without `read_only=True`")


def _check_retention(args: Any, manager: CheckpointManager) -> None:
    """Refuse retention that could remove the best checkpoint before the end of the training."""
    options = opened_by(manager).options
    if not args.load_best_model_at_end or options.keep_last_n is None:
        return
    metric, mode = _best_of(args)
    if not options.keep_best_n or (options.best_metric, options.best_mode) != (metric, mode):
        raise InvalidArgument(
            f"`load_best_model_at_end` with `keep_last_n={options.keep_last_n}`",
            "the best checkpoint may be removed before the end",
            f'open the manager with `keep_best_n=1, best_metric="{metric}", best_mode="{mode}"`',
        )


def _check_version(base: Any) -> None:
    missing = [name for name in _OVERRIDDEN if not hasattr(base, name)]
    if missing:
        raise UnsupportedFormat(
            f"transformers {transformers.__version__}",
            f"its `Trainer` has no `{missing[0]}`, which saving and resuming depend on",
            "install the version that this package was tested with, or use a CheckpointManager in "
            "a training loop",
        )


def _check_arguments(args: Any) -> None:
    """Refuse arguments that a manager handles differently, or not at all."""
    hint = "pass `keep_last_n` to the manager"
    _refuse("save_total_limit", hint, args.save_total_limit is not None)
    hint = "leave it out: saves do not block training"
    _refuse("save_only_model", hint, args.save_only_model)
    hint = '`hub_strategy="end"` pushes the model after training'
    _refuse("hub_strategy", hint, args.push_to_hub and args.hub_strategy != "end")


def _check_strategy(trainer: Any) -> None:
    """Refuse strategies that keep their own states."""
    _refuse("deepspeed", "use FSDP2, or DeepSpeed's own checkpoints", trainer.is_deepspeed_enabled)
    _refuse("fsdp", "use FSDP2: `fsdp_config={'version': 2}`", _is_fsdp1(trainer))


def _refuse(name: str, hint: str, is_set: bool) -> None:
    if is_set:
        raise InvalidArgument(
            f"`TrainingArguments({name}=...)` with a manager",
            "the manager does not support it, or handles it differently",
            hint,
        )


def _is_fsdp1(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2  # noqa: PLR2004


def _trainable(model: Any) -> dict[str, Any]:
    """Return a model's trainable parameters, and its persistent buffers."""
    named = model.named_parameters(remove_duplicate=False)  # tied ones under all of their names
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def _text_of(state: Any, callbacks: list[Any]) -> str:
    """Return the trainer's state as JSON, with the current states of its callbacks."""
    exported: dict[str, Any] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            exported.setdefault(type(callback).__name__, []).append(callback.state())
    states = {name: of if len(of) > 1 else of[0] for name, of in exported.items()}
    changed = {"stateful_callbacks": states, "best_model_checkpoint": None}  # no directory
    return json.dumps(dataclasses.asdict(state) | changed)


def _metrics_of(state: Any) -> dict[str, Any]:
    """Return the numbers that were logged at this step."""
    logged = (entry for entry in state.log_history if entry.get("step") == state.global_step)
    return {name: value for entry in logged for name, value in entry.items()}


def _random_state() -> dict[str, Any]:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002  (what the trainer and its datasets use)
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
