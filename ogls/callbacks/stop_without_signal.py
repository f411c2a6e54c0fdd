"""Steps that teach nothing: written down, and stopped when they go on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from lightning import Callback, LightningModule, Trainer

from ogls.records import Batch
from ogls.system.exits import RunEnded
from ogls.tracking import Tracker


class StopWithoutSignal(Callback):
    """Ends a run that learns nothing.

    A step whose loss or gradient is not finite leaves the weights as they are (`train/skipped` is 1) and its batch goes
    to the run's folder. A step without a lesson is what groups that are all right or all wrong give.

    Args:
        max_skipped: skipped steps in a row that end the run.
        max_silent: steps without a lesson, in a row, that end it.
    """

    def __init__(self, max_skipped: int = 3, max_silent: int = 20) -> None:
        if max_skipped < 1 or max_silent < 1:
            raise ValueError(f"max_skipped and max_silent must be at least 1, got {max_skipped} and {max_silent}")
        self.max_skipped, self.max_silent = max_skipped, max_silent
        self._skipped = self._silent = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._skipped = self._skipped + 1 if metrics.get("train/skipped") else 0
        self._silent = self._silent + 1 if metrics.get("train/lessons") == 0 else 0
        written = self._write(trainer, batch) if self._skipped else ""
        if self._skipped == self.max_skipped:
            raise RunEnded(f"loss or gradient was not finite in {self._skipped} steps in a row{written}")
        if self._silent == self.max_silent:
            raise RunEnded(
                f"no step had a lesson since {self._silent} steps: the groups are all right or all wrong "
                f"(train/accuracy {metrics.get('train/accuracy', 0):.3f}); take easier or harder problems"
            )

    def _write(self, trainer: Trainer, batch: Batch) -> str:
        """The batch as JSON; where to find it."""
        if not isinstance(trainer.logger, Tracker) or not trainer.is_global_zero:
            return ""
        file = trainer.logger.run_folder / f"skipped-step-{trainer.global_step:06d}.json"
        file.write_text(json.dumps(asdict(batch)))
        return f"; see {file}"
