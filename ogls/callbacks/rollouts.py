"""RolloutWriter writes the rollouts of `predict` to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from ogls.records import RolloutGroup


class RolloutWriter(Callback):
    """RolloutWriter writes one JSON object per rollout to `data.predict_file`.

    It holds the problem, the prompt's ids, the completion, the text and the verdict.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._file = Path(data.predict_file)
        if trainer.is_global_zero:
            self._file.write_text("")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Sequence[RolloutGroup],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero:  # every process has all rollouts
            return
        with self._file.open("a", encoding="utf-8", errors="backslashreplace") as out:
            for group in batch:
                for rollout in group.rollouts:
                    row = {"problem": asdict(group.problem), "prompt_ids": group.prompt_ids, **asdict(rollout)}
                    out.write(json.dumps(row | {"correct": rollout.correct}, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"rollouts written to {self._file}")
