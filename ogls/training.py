"""A Lightning Trainer as this project needs it, for the command line and for Python alike."""

from __future__ import annotations

from typing import Any

from lightning import Trainer

from ogls.callbacks import GracefulStop, RolloutWriter, RunRecorder, StepProgress, StopWithoutSignal
from ogls.callbacks.checkpoint_io import SoundCheckpoints

SETTINGS = {
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "inference_mode": False,  # an engine started during validation is updated during training
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
"""Settings of the Trainer that a run of rollouts needs."""


def callbacks() -> list[Any]:
    """Returns the callbacks that every run has."""
    return [RunRecorder(), StepProgress(), GracefulStop(), StopWithoutSignal(), RolloutWriter()]


def make_trainer(**settings: Any) -> Trainer:
    """Returns Lightning's Trainer with the settings, callbacks and checkpoints of a run on the command line.

    Args:
        settings: arguments of the Trainer; `callbacks` and `plugins` are added to those that every run has
    """
    own = [*callbacks(), *settings.pop("callbacks", [])]
    plugins = [SoundCheckpoints(), *settings.pop("plugins", [])]
    return Trainer(**(SETTINGS | settings), callbacks=own, plugins=plugins)
