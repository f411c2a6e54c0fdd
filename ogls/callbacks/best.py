"""Which checkpoints are written."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError

from ogls.callbacks.checkpoint_io import SoundCheckpoints, newest_sound
from ogls.tracking import Tracker

ADAPTER = "best_adapter"  # folder beside the checkpoints, and artifact
CHECKPOINTS = "checkpoints"  # what Lightning calls the folder
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt` by a validation metric, `last.ckpt` for going on, and the adapter of the best where one is trained.

    `fit --ckpt_path last` takes the newest sound `last.ckpt` of the same method and seed or, where that is damaged, the
    one before it, which is kept as `previous.ckpt`.

    Args:
        monitor: metric whose highest value is the best.
        save_every: optimiser steps between two `last.ckpt`.
    """

    def __init__(self, monitor: str = "val/avg_at_4", save_every: int = 5) -> None:
        if save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {save_every}")
        super().__init__(
            monitor=monitor,
            mode="max",
            save_top_k=1,
            filename="best",
            save_last=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.save_every = save_every

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a metric that the validation does not give, before any weights are loaded."""
        data = cast(Any, trainer).datamodule
        asked = re.fullmatch(r"val\w*/(avg|pass|maj)_at_(\d+)", self.monitor or "")
        if data.fit_follows or stage == "fit":
            k, samples = int(asked[2]) if asked else 1, data.evaluation.samples
            if asked and (k > samples or (asked[1] == "avg" and k != samples)):
                raise ValueError(
                    f"a checkpoint waits for {asked[0]}, but data.evaluation.samples is {samples}: "
                    f"expected val/avg_at_{samples}"
                )
        super().setup(trainer, pl_module, stage)

    def save_last_now(self, trainer: Trainer) -> Path:
        """Writes `last.ckpt`; what had that name stays as `previous.ckpt`."""
        assert self.dirpath is not None
        path = Path(self.dirpath) / LAST
        if trainer.is_global_zero and path.exists():
            previous = path.with_name(PREVIOUS)
            with suppress(OSError):  # a full disk, or a file system without links
                previous.unlink(missing_ok=True)
                os.link(path, previous)
        trainer.save_checkpoint(path, weights_only=False)
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, SoundCheckpoints) and writer.failed and isinstance(trainer.logger, Tracker):
            trainer.logger.log_metrics({"train/checkpoints_failed": writer.failed}, trainer.global_step)
        return path

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best so far, unless it lies in another run's folder."""
        assert self.dirpath is not None
        if Path(state_dict["dirpath"]).resolve() == Path(self.dirpath).resolve():
            super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step % self.save_every == 0 and not trainer.is_last_batch:
            self.save_last_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch's last step is saved here: from before the epoch's end, Lightning would go on in the same epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.global_step % self.save_every == 0:
            self.save_last_now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.best_model_score
        super().on_validation_end(trainer, pl_module)
        if self.best_model_score is not before and trainer.is_global_zero:
            policy: Any = pl_module.policy
            if policy.lora is not None:
                self._save_adapter(policy)

    def _save_adapter(self, policy: Any) -> None:
        draft = self._adapter.with_name(f".{ADAPTER}.draft")
        try:
            policy.save_adapter(draft)
            self._adapter.mkdir(exist_ok=True)
            for file in draft.iterdir():
                file.replace(self._adapter / file.name)
            draft.rmdir()
        except (OSError, SafetensorError) as error:  # it can be made from best.ckpt, and the run can go on
            print(f"{self._adapter} keeps what it had: {error}", file=sys.stderr)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_last_now(trainer)
        if isinstance(trainer.logger, Tracker) and self._adapter.exists():
            trainer.logger.log_folder(self._adapter, ADAPTER)

    @property
    def _adapter(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath).parent / ADAPTER

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What `ckpt_path="last"` chooses the newest of: the one that is to be taken."""
        if not isinstance(trainer.logger, Tracker):
            return super()._find_last_checkpoints(trainer)
        tracker = trainer.logger
        runs = (f"{tracker.label}-*", tracker.run_name)
        patterns = [f"{run}/{CHECKPOINTS}/{file}" for run in runs for file in (LAST, PREVIOUS)]
        found = {path for pattern in patterns for path in tracker.folder.glob(pattern)}
        newest = newest_sound(found)
        if newest is None:
            raise ValueError(f"--ckpt_path last: there is no {'sound ' if found else ''}{tracker.folder / patterns[0]}")
        return {str(newest)}
