"""RunExhibits hands MLflow the prompts' templates at the start of training, and the best model at its end."""

from __future__ import annotations

import json
from typing import Any

from lightning import Callback, LightningModule, Trainer

from ogls.tracking import best, prompts, tracker_of
from ogls.tracking.data_told import problems_told
from ogls.tracking.files import BEST, METRICS, PROMPTS, read_rows


class RunExhibits(Callback):
    """RunExhibits writes `prompts.json` and `best.json`, from which MLflow's pages of prompts and models are made."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (tracker := tracker_of(trainer)) and trainer.is_global_zero:
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            templates = prompts.used(data.prompts, pl_module.method)
            tracker.keep(PROMPTS, json.dumps(templates, indent=1, ensure_ascii=False))
            tracker.tell(lambda run: prompts.write(run, templates))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tracker, monitor = tracker_of(trainer), getattr(trainer.checkpoint_callback, "monitor", None)
        if tracker is None or monitor is None or not trainer.is_global_zero:
            return
        file = tracker.run_folder / METRICS
        row = best.best_of(read_rows(file) if file.is_file() else [], monitor)
        if row is not None:
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            splits = problems_told({"train": data.train_problems, "val": data.val_problems})
            digests = {name: split["digest"] for name, split in splits.items()}
            told = best.told(row, monitor, digests, tracker.run_folder)
            tracker.keep(BEST, json.dumps({**told, "register": tracker.register}, indent=1))
            tracker.tell(lambda run: best.write(run, told, tracker.configuration, tracker.register))
