"""RunRecorder tells the tracker what a run is made of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from ogls.callbacks.best import CHECKPOINTS, BestCheckpoint, described
from ogls.records import Phase, RolloutGroup
from ogls.tracking import Tracker


class RunRecorder(Callback):
    """RunRecorder hands the tracker the run's data, timeline and validations, and continues the MLflow run.

    Lightning calls checkpoint callbacks last, so this one decides on the run's folder before they look at it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells the tracker the method and seed, and how many updates there were."""
        if isinstance(trainer.logger, Tracker):
            trainer.logger.updates = lambda: trainer.global_step
            described(trainer.logger, trainer)
            if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
                trainer.logger.hold_folder()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continues the checkpoint's MLflow run, and its folder where the checkpoint lies in a run's folder."""
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
        """Adds to the checkpoint which run it belongs to, and the metrics of its step."""
        if isinstance(trainer.logger, Tracker):
            checkpoint["mlflow_run_id"] = trainer.logger.run_id
            checkpoint["seed"] = trainer.logger.seed
            checkpoint["run"], checkpoint["config_sha256"] = trainer.logger.run_name, trainer.logger.config_sha256
            # Lightning logs a step after its callbacks, and a kill may come between the two.
            checkpoint["row"] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Claims the run's folder, and logs the problems."""
        if isinstance(trainer.logger, Tracker):
            trainer.logger.hold_folder()  # not earlier: a checkpoint may say which folder it is
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
    """Returns a row of the table of completions: a problem and its first rollout."""
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
