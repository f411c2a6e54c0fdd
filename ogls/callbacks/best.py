"""Which checkpoints are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ogls.tracking import Tracker

ADAPTER = "best_adapter"  # folder beside the checkpoints, and artifact
CHECKPOINTS = "checkpoints"  # what Lightning calls the folder


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt` by a validation metric, `last.ckpt` for going on, and the adapter of the best.

    `fit --ckpt_path last` takes the newest `last.ckpt` of the same method and seed.

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

    def save_last_now(self, trainer: Trainer) -> Path:
        """Writes `last.ckpt`."""
        assert self.dirpath is not None
        path = Path(self.dirpath) / "last.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        return path

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best so far, unless it lies in another run's folder."""
        assert self.dirpath is not None
        if Path(state_dict["dirpath"]).resolve() == Path(self.dirpath).resolve():
            super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step % self.save_every == 0:
            self.save_last_now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.best_model_score
        super().on_validation_end(trainer, pl_module)
        if self.best_model_score is not before and trainer.is_global_zero:
            policy: Any = pl_module.policy
            policy.save_adapter(self._adapter)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_last_now(trainer)
        if isinstance(trainer.logger, Tracker) and self._adapter.exists():
            trainer.logger.log_folder(self._adapter, ADAPTER)

    @property
    def _adapter(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath).parent / ADAPTER

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What `ckpt_path="last"` chooses the newest of."""
        if not isinstance(trainer.logger, Tracker):
            return super()._find_last_checkpoints(trainer)
        tracker = trainer.logger
        pattern = f"{tracker.method}-s{tracker.seed}-*/checkpoints/last.ckpt"
        found = {str(path) for path in tracker.folder.glob(pattern)}
        found |= {str(path) for path in tracker.run_folder.glob("checkpoints/last.ckpt")}
        if not found:
            raise ValueError(f"--ckpt_path last: there is no {tracker.folder / pattern}")
        return found
