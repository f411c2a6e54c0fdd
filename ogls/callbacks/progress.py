"""Progress is shown as a bar in a terminal, and as one line per step elsewhere."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PHASES = ("generate", "grade", "reflect", "teacher", "student", "sync", "wait")


class RichProgress(ProgressBar):
    """RichProgress shows step, loss, accuracy of the rollouts, the last validation, and the seconds of each phase."""

    def __init__(self) -> None:
        super().__init__()
        _quieten_lightning()
        self._console = Console()
        self._progress: Progress | None = None
        self._enabled = True
        self._validated = ""

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._total = int(trainer.estimated_stepping_batches)
        self._clock = time.monotonic()
        if self._enabled and self._console.is_terminal:
            columns = (BarColumn(30), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("first rollouts", total=self._total, completed=trainer.global_step)
            self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        line = "  ".join(filter(None, [describe(values), self._validated, f"{seconds:.1f} s: {phases(values)}"]))
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step, description=line)
        elif self._enabled:
            print(f"step {trainer.global_step}/{self._total}  {line}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        accuracy = next((name for name in values if name.startswith("val/avg_at_") and name[11:].isdigit()), None)
        self._clock = time.monotonic()
        if accuracy is None or trainer.sanity_checking or not self._enabled:
            return
        self._validated = f"val {values[accuracy]:.3f}"
        low, high = values.get(f"{accuracy}_low"), values.get(f"{accuracy}_high")
        interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        self._console.print(
            f"after step {trainer.global_step}: {accuracy} {values[accuracy]:.3f}{interval}",
            markup=False,
            highlight=False,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe(values: dict[str, float]) -> str:
    """Returns loss and accuracy as text; a step may lack either."""
    shown = {"loss": values.get("train/loss"), "accuracy": values.get("train/accuracy")}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)


def phases(values: dict[str, float]) -> str:
    """Returns the seconds of each measured phase as text."""
    measured = ((name, values.get(f"time/{name}")) for name in _PHASES)
    return " ".join(f"{name} {seconds:.1f}" for name, seconds in measured if seconds is not None)


def _quieten_lightning() -> None:
    """Silences notes of Lightning that do not concern a run.

    They are about absent accelerators, products, and loaders of fixed data, whereas rollouts are a stream whose order
    and seeds follow from the step.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.* is deprecated",
        ".*does not have many workers",
        ".*your dataloader is not resumable",
        "Checkpoint directory .* exists and is not empty",  # a run that goes on
        ".*sync_dist=True",  # vLLM in this process has set up torch.distributed for itself
        ".*module\\(s\\) in eval mode",  # the policy has no dropout: there is no mode to be in
        ".*overridden `transfer_batch_to_device`",
        "Total length of `list`",
    ):
        warnings.filterwarnings("ignore", message=message)
