"""StopWithoutSignal ends a run whose steps teach nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from lightning import Callback, LightningModule, Trainer

from ogls.records import Batch
from ogls.system.exits import RunEnded
from ogls.tracking import tracker_of


class StopWithoutSignal(Callback):
    """StopWithoutSignal ends a run that learns nothing.

    A step whose loss or gradient is not finite is skipped: the weights stay as they are (`train/skipped` is 1), and the
    batch is written to the run's folder. A step has no lesson where all groups are right or wrong as a whole.

    Args:
        max_skipped: number of skipped steps in a row that ends the run
        max_silent: number of steps in a row without a lesson that ends the run

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, max_skipped: int = 3, max_silent: int = 20) -> None:
        if max_skipped < 1 or max_silent < 1:
            raise ValueError(f"max_skipped and max_silent must be at least 1, got {max_skipped} and {max_silent}")
        self.max_skipped, self.max_silent = max_skipped, max_silent
        self._skipped = self._silent = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = outputs["row"]
        self._skipped = self._skipped + 1 if metrics.get("train/skipped") else 0
        self._silent = self._silent + 1 if metrics.get("train/lessons") == 0 else 0
        written = self._write(trainer, batch) if self._skipped else ""
        if self._skipped == self.max_skipped:
            raise RunEnded(f"loss or gradient was not finite in {self._skipped} steps in a row{written}")
        if self._silent == self.max_silent:
            raise RunEnded(
                f"no step had a lesson for {self._silent} steps (train/accuracy "
                f"{metrics.get('train/accuracy', 0):.3f}). Where groups are all right or all wrong, take harder or "
                "easier problems; else the method finds nothing in these rollouts that it learns from"
            )

    def _write(self, trainer: Trainer, batch: Batch) -> str:
        """Writes the batch as JSON, and returns a hint where it is."""
        tracker = tracker_of(trainer)
        if tracker is None or not trainer.is_global_zero:
            return ""
        file = tracker.run_folder / f"skipped-step-{trainer.global_step:06d}.json"
        try:
            file.write_text(json.dumps(asdict(batch)))
        except OSError as error:
            return f"; its batch could not be written ({error})"
        return f"; see {file}"
