"""A Lightning Trainer as this project needs it, for the command line and for Python alike."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies import StrategyRegistry

from ogls.callbacks import (
    GracefulStop,
    RolloutTraces,
    RolloutWriter,
    RunExhibits,
    RunRecorder,
    StepProgress,
    StopWithoutSignal,
)
from ogls.callbacks.checkpoint_io import SoundCheckpoints
from ogls.data import RolloutDataModule
from ogls.module import SelfDistillation
from ogls.sharded import Sharded
from ogls.system.ranges import within
from ogls.tracking import tracker_of

StrategyRegistry.register("sharded", Sharded, description="FSDP2, with a checkpoint of one file", override=True)

SETTINGS = {
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "inference_mode": False,  # an engine started during validation is updated during training
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
"""Settings of the Trainer that a run of rollouts needs."""

_INSTEAD = {
    "gradient_clip_val": "model.max_grad_norm",
    "gradient_clip_algorithm": "model.max_grad_norm",
    "accumulate_grad_batches": "model.tokens_per_micro_batch for memory, data.problems_per_step for the batch",
    "precision": "policy.dtype",
    "limit_train_batches": "data.steps_per_epoch",
    "overfit_batches": "data.train, with few problems",
    "val_check_interval": "data.steps_per_epoch, after which a validation comes",
    "max_steps": "trainer.max_epochs and data.steps_per_epoch",
}
"""Arguments of the Trainer that a run of rollouts has no use for, and the keys that do what they stand for."""


def callbacks(settings: Mapping[str, Any]) -> list[Any]:
    """Returns the callbacks that every run has; the progress unless the Trainer's `settings` switch it off."""
    shown = [] if settings.get("enable_progress_bar") is False else [StepProgress()]
    recording = [RunRecorder(), RunExhibits(), RolloutTraces()]
    return [*recording, *shown, GracefulStop(), StopWithoutSignal(), RolloutWriter()]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Looks at arguments of the Trainer before anything is loaded.

    Raises:
        ValueError: an argument would be ignored or would break the run; the message names the key to take instead.
    """
    for name, instead in _INSTEAD.items():
        default = inspect.signature(Trainer).parameters[name].default
        if settings.get(name, default) not in (default, None):
            raise ValueError(f"trainer.{name} has no place here, got {settings[name]!r}: set {instead}")
    within("trainer.max_epochs", settings.get("max_epochs"), "[1, 1e9]")


def refused(error: Exception, settings: Mapping[str, Any]) -> ValueError:
    """Returns what the Trainer says about its arguments, in one line with those that are not its defaults."""
    known = inspect.signature(Trainer).parameters
    plain = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
    given = [f"trainer.{n} {v}" for n, v in plain.items() if v not in (known[n].default, SETTINGS.get(n))]
    return ValueError(f"{' '.join(str(error).split())} Given: {', '.join(given) or 'the defaults'}")


def make_trainer(**settings: Any) -> Trainer:
    """Returns Lightning's Trainer with the settings, callbacks and checkpoints of a run on the command line.

    Args:
        settings: arguments of the Trainer; `callbacks` and `plugins` are added to those that every run has
    """
    check_settings(settings)
    own = [*callbacks(settings), *settings.pop("callbacks", [])]
    plugins = [SoundCheckpoints(), *settings.pop("plugins", [])]
    return Trainer(**(SETTINGS | settings), callbacks=own, plugins=plugins)


def fit(trainer: Trainer, model: SelfDistillation, data: RolloutDataModule) -> None:
    """Trains a new run as the command line does: the student is validated before the first step, too.

    Args:
        trainer: Trainer of `make_trainer`, which has fitted nothing yet
        model: student, method and optimiser
        data: problems and engine
    """
    if tracker := tracker_of(trainer):
        tracker.describe(model.method.name, data.seed)
        tracker.begin()
    validate_first(trainer, model, data)
    trainer.fit(model, data)


def validate_first(trainer: Trainer, model: SelfDistillation, data: RolloutDataModule) -> None:
    """Validates the student before the first step of a new run, which stays open; a run without an engine cannot."""
    if data.engine is None:
        return
    data.fit_follows = True
    tracker = tracker_of(trainer)
    with tracker.kept_open() if tracker is not None else nullcontext():
        trainer.validate(model, data, verbose=False)
