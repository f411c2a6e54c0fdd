"""RolloutTraces keeps a sample of a run's rollouts and shows them in MLflow as traces."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer

from ogls.records import Batch, Phase, RolloutGroup
from ogls.tracking import Tracker, traces, tracker_of
from ogls.tracking.files import ROLLOUTS, read_rows, write_rows
from ogls.tracking.rollouts import drawn_of_step, drawn_of_validation, share, told


class RolloutTraces(Callback):
    """RolloutTraces takes the tracker's number of rollouts from each epoch and each validation.

    They are those that the first process made. Traces say what the model wrote, what the verifier said of it, what the
    teacher read and which tokens were learned.
    """

    def __init__(self) -> None:
        self._keys: set[str] = set()
        self._began = 0.0
        self._goes_on_at = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._goes_on_at = checkpoint["global_step"]  # which the trainer does not know until training starts

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes back what a run that goes on makes again, and hands MLflow what it lacks of the rest."""
        if (tracker := _tracker(trainer)) is None or trainer.ckpt_path is None:
            return
        file = tracker.run_folder / ROLLOUTS
        rows = read_rows(file, keep_damaged=True) if file.is_file() else []
        kept = [row for row in rows if row["step"] <= self._goes_on_at]
        self._keys = {row["key"] for row in kept}
        if kept != rows:
            write_rows(file, kept)
        tracker.tell(lambda run: traces.write(run, kept))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (tracker := _tracker(trainer)) is None or not isinstance(batch, Batch):
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        step = trainer.global_step
        number = share(tracker.traces, data.steps_per_epoch, step - 1, data.seed)
        chosen = drawn_of_step(batch.groups, number, step, data.seed)
        self._keep(trainer, pl_module, tracker, "train", step, chosen, outputs["phases"], batch.lessons)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.time()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Sequence[RolloutGroup],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if (tracker := _tracker(trainer)) is None or dataloader_idx or trainer.sanity_checking:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        module: Any = pl_module
        step = module.policy.version
        whole = [
            Phase(lane="rollouts", name=name, step=step, start=self._began, end=time.time())
            for name in ("generate", "grade")
        ]
        chosen = drawn_of_validation(batch, tracker.traces, data.seed)
        self._keep(trainer, pl_module, tracker, "val", step, chosen, whole)

    def _keep(
        self,
        trainer: Any,
        module: Any,
        tracker: Tracker,
        split: str,
        step: int,
        chosen: Sequence[tuple[RolloutGroup, int]],
        phases: Sequence[Phase],
        lessons: Sequence[Any] = (),
    ) -> None:
        decode, locator = module.policy.tokenizer.decode, getattr(trainer.datamodule, "locator", None)
        made = [
            told(group, place, split, step, phases, lambda ids: str(decode(list(ids))), lessons, locator)
            for group, place in chosen
        ]
        rows = [row for row in made if row["key"] not in self._keys]
        if rows:
            self._keys |= {row["key"] for row in rows}
            tracker.append(ROLLOUTS, "".join(json.dumps(row) + "\n" for row in rows))
            tracker.tell(lambda run: traces.write(run, rows))


def _tracker(trainer: Any) -> Tracker | None:
    """Returns the tracker that wants rollouts from this process; None where there is none."""
    tracker = tracker_of(trainer)
    return tracker if tracker is not None and tracker.traces and trainer.is_global_zero else None
