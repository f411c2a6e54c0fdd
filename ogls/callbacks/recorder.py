"""What a run is made of, for the tracker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from ogls.callbacks.best import CHECKPOINTS, BestCheckpoint
from ogls.records import Phase, RolloutGroup
from ogls.tracking import Tracker


class RunRecorder(Callback):
    """Ties the run to the `Tracker`: data, timeline, what each validation showed, going on in the same MLflow run.

    Lightning moves the checkpoint callbacks to the end, so this one decides on the run's folder before they look at it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.logger, Tracker):
            trainer.logger.updates = lambda: trainer.global_step
            if trainer.logger.method is None:
                method, data = cast(Any, pl_module).method, cast(Any, trainer).datamodule
                trainer.logger.describe(method.name, data.seed)
            if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
                trainer.logger.hold_folder()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run that goes on keeps its MLflow run, and its folder where the checkpoint lies in one."""
        if trainer.state.fn != TrainerFn.FITTING or not isinstance(trainer.logger, Tracker):
            return
        folder = Path(str(trainer.ckpt_path)).parent
        if folder.name != CHECKPOINTS:
            trainer.logger.resume(checkpoint.get("mlflow_run_id"))
            trainer.logger.hold_folder()
            return
        trainer.logger.resume(checkpoint.get("mlflow_run_id"), folder.parent)
        trainer.logger.hold_folder()
        trainer.logger.rewind(checkpoint["global_step"], checkpoint["row"])
        if isinstance(trainer.checkpoint_callback, BestCheckpoint):
            trainer.checkpoint_callback.dirpath = str(folder)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if isinstance(trainer.logger, Tracker):
            checkpoint["mlflow_run_id"] = trainer.logger.run_id
            checkpoint["run"], checkpoint["config_sha256"] = trainer.logger.run_name, trainer.logger.config_sha256
            # Lightning logs a step after its callbacks, and a kill may come between the two.
            checkpoint["row"] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.logger, Tracker):
            trainer.logger.hold_folder()  # not earlier: a checkpoint may say which it is
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            trainer.logger.log_data({"train": data.train_problems, "val": data.val_problems})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if isinstance(trainer.logger, Tracker):
            trainer.logger.log_phases(outputs["phases"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.time()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.logger, Tracker):
            step = trainer.global_step
            whole = Phase(lane="training", name="validate", step=step, start=self._began, end=time.time())
            trainer.logger.log_phases([whole])

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows: list[dict[str, Any]] = []
        self._accuracy: dict[str, float] = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Sequence[RolloutGroup],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == 0:
            self._rows += [_row(group) for group in batch]
            self._accuracy |= {group.problem.id: len(group.successes) / len(group.rollouts) for group in batch}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.logger, Tracker) and not trainer.sanity_checking:
            trainer.logger.log_completions(self._rows, trainer.global_step)
            trainer.logger.log_problems(self._accuracy, trainer.global_step)


def _row(group: RolloutGroup) -> dict[str, Any]:
    """A problem and its first rollout."""
    rollout = group.rollouts[0]
    return {
        "problem": group.problem.text,
        "completion": rollout.text,
        "correct": rollout.correct,
        "extracted": rollout.verdict.answer,
        "answer": group.problem.answer,
        "status": "truncated" if rollout.truncated else rollout.verdict.status,
        "tokens": len(rollout.completion.token_ids),
        "group_accuracy": len(group.successes) / len(group.rollouts),
    }
