"""A run without a language model: one weight, records made by hand, the callbacks and the tracker as in a real run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from ogls.callbacks import BestCheckpoint, GracefulStop, RunRecorder, StepProgress
from ogls.callbacks.checkpoint_io import SoundCheckpoints
from ogls.module import SelfDistillation
from ogls.policy.policy import Policy
from ogls.records import Completion, Phase, Problem, Rollout, RolloutGroup, Verdict
from ogls.rollout.accuracy import Evaluation
from ogls.tasks.base import ProblemSource
from ogls.tracking import Tracker

STEPS = 4  # per epoch


def group(i: int, correct: bool) -> RolloutGroup:
    completion = Completion(token_ids=(1, 2), logprobs=(-0.1, -0.2), finish_reason="stop")
    verdict = Verdict(correct=correct, status="graded", answer=str(i))
    rollout = Rollout(completion=completion, text=f"\\boxed{{{i}}}", verdict=verdict)
    problem = Problem(id=f"p{i}", text=f"What is {i}?", answer=str(i))
    return RolloutGroup(problem=problem, prompt_ids=(5,), rollouts=(rollout,), policy_version=0)


class Problems(ProblemSource):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Problem:
        return group(index, True).problem


class Steps:
    """Sized, like the product's stream of rollouts; says which step it makes a batch for."""

    def __init__(self, data: TinyData) -> None:
        self.data = data

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Any:
        assert self.data.trainer is not None
        for _ in range(self.data.trainer.global_step % STEPS, STEPS):
            yield torch.tensor([float(self.data.trainer.global_step)])


class TinyData(LightningDataModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.train_problems = Problems(3)
        self.val_problems = Problems(2)
        self.evaluation = Evaluation(samples=4)
        self.fit_follows = False

    def train_dataloader(self) -> Any:
        return Steps(self)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def val_dataloader(self) -> Any:
        return DataLoader([group(i, i % 2 == 0) for i in range(3)], collate_fn=list)


class TinyPolicy(torch.nn.Linear):
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.named_parameters())

    lora, version, parts = "stands for one", 0, None
    name, adapter = "tiny", None
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    swapped, _fill = Policy.swapped, Policy._fill

    def save_adapter(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter.txt").write_text(str(self.weight.item()))


class Tiny(LightningModule):
    """Step t moves the weight by t + 1, so the weight tells which steps were made."""

    def __init__(self, rises: bool = True, during: dict[int, Callable[[], None]] | None = None) -> None:
        super().__init__()
        self.during = during or {}  # what happens in the course of a step
        self.automatic_optimization = False
        self.method = SimpleNamespace(name="tiny")
        self.policy = TinyPolicy(1, 1, bias=False)
        torch.nn.init.zeros_(self.policy.weight)
        self.rises = rises

    log_row = SelfDistillation.log_row

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        assert int(batch) == self.trainer.global_step
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(-(self.policy.weight * (batch + 1)).sum())
        optimizer.step()
        self.during.get(self.trainer.global_step, lambda: None)()
        self.policy.version = step = self.trainer.global_step
        row = {"train/loss": 1.0 / step, "train/accuracy": 0.5, "time/student": 0.1}
        self.log_row(row, step)
        phases = [Phase(lane="training", name="student", step=step, start=float(step), end=step + 0.5)]
        return {"phases": phases, "row": row}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.policy.version = checkpoint["global_step"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        accuracy = 0.1 * (1 + self.trainer.global_step) if self.rises else 1.0 - 0.1 * self.trainer.global_step
        self.log_dict({"val/avg_at_4": accuracy, "val/avg_at_4_low": accuracy - 0.1}, batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer(epochs: int, **tracker: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        logger=Tracker(**tracker),
        callbacks=[RunRecorder(), BestCheckpoint(save_every=1), GracefulStop(), StepProgress()],
        plugins=[SoundCheckpoints()],
        accelerator="cpu",
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_model_summary=False,
    )
