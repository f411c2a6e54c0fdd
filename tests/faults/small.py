"""A run of seconds in which everything is real but the engine: policy, teacher, grading, checkpoints, record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from ogls.callbacks import BestCheckpoint, GracefulStop, RunRecorder, StopWithoutSignal
from ogls.callbacks.checkpoint_io import SoundCheckpoints
from ogls.data import RolloutDataModule
from ogls.lessons.privilege import PeerOutcomes
from ogls.lessons.prompts import Prompts
from ogls.lessons.selection import UpToError
from ogls.loss.steering import OutcomeSteering
from ogls.module import SelfDistillation
from ogls.policy.lora import Lora
from ogls.policy.sharding import whole
from ogls.policy.teacher import EMA
from ogls.records import Sampling
from ogls.rollout.accuracy import Evaluation
from ogls.tasks.chains import ChainErrors, Chains
from ogls.tracking import Tracker
from tests.faults.boxed import Boxed
from tests.pair import make_pair
from tests.scripted import ChainEngine

EPOCHS, STEPS = 3, 4
AWAY = "http://127.0.0.1:9"  # a tracking server that refuses at once


def pair(model: Path, **changes: Any) -> tuple[SelfDistillation, RolloutDataModule]:
    """A module and its data; `changes` go to policy, method, module and data by their names."""
    settings: dict[str, Any] = {
        "lora": Lora(rank=4, alpha=8),
        "dtype": "float32",
        "privilege": PeerOutcomes(max_peers=1),
        "teacher": EMA(0.5),
        "steering": OutcomeSteering(),
        "selection": UpToError(),
        "learning_rate": 1e-3,
        "schedule": "linear",
        "train": Chains(size=30),
        "val": Chains(size=4, split="heldout"),
        "prompts": Prompts(system="", student="{problem}", views={"attempt": "{problem} Not {text}?"}),
        "engine": ChainEngine(),
        "locator": ChainErrors(),
        "verifier": Boxed(),
        "max_tokens": 60,
        "evaluation": Evaluation(samples=2, sampling=Sampling(max_tokens=60)),
        "group_size": 3,
        "problems_per_step": 3,
        "steps_per_epoch": STEPS,
        "context_length": 300,
    }
    return make_pair(model, **(settings | changes))


def trainer(
    folder: Path, callbacks: Sequence[Callback] = (), epochs: int = EPOCHS, tracking_uri: str = AWAY, **changes: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": epochs,
        "logger": Tracker(
            folder=str(folder), run_name="small-s0-run", tracking_uri=tracking_uri, system_metrics=False, traces=0
        ),
        "callbacks": [
            RunRecorder(),
            BestCheckpoint(save_every=1),
            GracefulStop(),
            StopWithoutSignal(),
            *callbacks,
        ],
        "plugins": [SoundCheckpoints()],
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    return Trainer(**(settings | changes))


def fit(
    model: Path,
    folder: Path,
    *,
    goes_on: bool = False,
    callbacks: Sequence[Callback] = (),
    epochs: int = EPOCHS,
    training: Mapping[str, Any] | None = None,
    tracking_uri: str = AWAY,
    **changes: Any,
) -> SelfDistillation:
    """Train in `folder`; with `goes_on`, from its last checkpoint. `changes` are those of `pair`."""
    student, problems = pair(model, **changes)
    try:
        made = trainer(folder, callbacks, epochs, tracking_uri, **(training or {}))
        made.fit(student, problems, ckpt_path="last" if goes_on else None)
    finally:
        problems.close()
    return student


def weights(student: SelfDistillation) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in student.policy.trainable().items()}
