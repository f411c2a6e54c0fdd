"""RunRecorder tells the tracker what a run is made of."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from ogls.callbacks.best import BestCheckpoint, described
from ogls.records import Phase, RolloutGroup
from ogls.tracking import Tracker, tracker_of
from ogls.tracking.config import differences
from ogls.tracking.data_told import problems_told
from ogls.tracking.files import CHECKPOINTS
from ogls.tracking.tracker import ROWS_LIMIT


class RunRecorder(Callback):
    """RunRecorder hands the tracker the run's data, timeline and validations, and continues the MLflow run.

    A run that goes on does so as what it was (configuration, problems), unless `allow_changes`. Lightning calls
    checkpoint callbacks last, so this one decides on the run's folder before they look at it.
    """

    def __init__(self, allow_changes: bool = False) -> None:
        self.allow_changes = allow_changes
        self._data: dict[str, str] = {}
        self._goes_on_at = 0
        self._row: dict[str, float] = {}  # of the latest step
        self._rows: list[dict[str, Any]] = []  # of the latest validation, as is the accuracy by problem
        self._accuracy: dict[str, float] = {}
        self._validated_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells the tracker the method and seed, and how many updates there were."""
        if tracker := tracker_of(trainer):
            tracker.updates = lambda: _updates(pl_module)
            described(tracker, trainer)
            if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
                tracker.hold_folder()
            if stage == "fit":
                data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
                told = problems_told(_splits(data))
                self._data = {f"problems of data.{name}": str(split["digest"]) for name, split in told.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns what MLflow has of the latest validation, since a kill may come before it is sent."""
        return {"rows": self._rows[:ROWS_LIMIT], "accuracy": self._accuracy, "validated_at": self._validated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._rows, self._accuracy = state_dict["rows"], state_dict["accuracy"]
        self._validated_at = state_dict["validated_at"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continues the checkpoint's MLflow run, and its folder where the checkpoint lies in a run's folder."""
        tracker = tracker_of(trainer)
        if trainer.state.fn != TrainerFn.FITTING or tracker is None:
            return
        self._compare(tracker, checkpoint, checkpoint.get("run", str(trainer.ckpt_path)))
        self._goes_on_at = checkpoint["global_step"]
        folder = Path(str(trainer.ckpt_path)).parent
        if folder.name != CHECKPOINTS:
            tracker.resume(checkpoint.get("mlflow_run_id"))
            tracker.hold_folder()
            return
        tracker.resume(checkpoint.get("mlflow_run_id"), folder.parent)
        tracker.hold_folder()
        tracker.rewind(checkpoint["global_step"], checkpoint["row"])
        if isinstance(trainer.checkpoint_callback, BestCheckpoint):
            trainer.checkpoint_callback.dirpath = str(folder)

    def _compare(self, tracker: Tracker, checkpoint: dict[str, Any], run: str) -> None:
        """A run goes on as what it was: another configuration, other data or other weights are refused by name.

        What a run without a tracker was, its checkpoints do not say.
        """
        saved, now = json.loads(checkpoint.get("identity", "{}")), self._identity(tracker)
        found = differences(saved, now) if saved and tracker.configuration else []
        told = "; ".join(found)
        if found and not self.allow_changes:
            raise ValueError(f"{run} was something else: {told}. Give the same, or --allow_changes to go on as this")
        print(f"Going on with {run} at step {checkpoint['global_step']}" + (f": {told}" if told else ""))

    def _identity(self, tracker: Tracker) -> dict[str, str]:
        return tracker.configuration | self._data

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds to the checkpoint which run it belongs to, and the metrics of its step."""
        checkpoint["row"] = self._row
        if tracker := tracker_of(trainer):
            checkpoint["mlflow_run_id"] = tracker.run_id
            checkpoint["seed"], checkpoint["method"] = tracker.seed, tracker.method
            checkpoint["identity"] = json.dumps(self._identity(tracker))
            checkpoint["run"], checkpoint["config_sha256"] = tracker.run_name, tracker.config_sha256

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so where a run that was to go on had come to its end before."""
        if trainer.is_global_zero and trainer.ckpt_path is not None and trainer.global_step == self._goes_on_at:
            print(f"No step was left to make: trainer.max_epochs is {trainer.max_epochs}; a larger one goes on")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Claims the run's folder, and logs the problems."""
        if tracker := tracker_of(trainer):
            if trainer.ckpt_path is None:
                tracker.begin()
            tracker.hold_folder()  # not earlier: a checkpoint may say which it is
            tracker.log_config(self._goes_on_at)
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            tracker.log_data(_splits(data))
            if trainer.ckpt_path is not None and self._rows:
                self._log_validation(tracker)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._row = outputs["row"]
        if tracker := tracker_of(trainer):
            tracker.log_phases(outputs["phases"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.time()
        if tracker := tracker_of(trainer):
            tracker.log_config(self._goes_on_at)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if tracker := tracker_of(trainer):
            tracker.log_config()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if tracker := tracker_of(trainer):
            step = _updates(pl_module)
            whole = Phase(lane="training", name="validate", step=step, start=self._began, end=time.time())
            tracker.log_phases([whole])

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows, self._accuracy, self._validated_at = [], {}, _updates(pl_module)

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
            self._accuracy |= {group.problem.name: len(group.successes) / len(group.rollouts) for group in batch}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (tracker := tracker_of(trainer)) and not trainer.sanity_checking:
            self._log_validation(tracker)

    def _log_validation(self, tracker: Tracker) -> None:
        tracker.log_completions(self._rows, self._validated_at)
        tracker.log_problems(self._accuracy, self._validated_at)


def _updates(module: Any) -> int:
    """Returns the number of updates that the weights have had; `validate` makes none, but its weights have had some."""
    return module.policy.version


def _splits(data: Any) -> dict[str, Any]:
    """Returns what is trained and judged on, each set of several by itself."""
    return {"train": data.train_problems} | data.val_problems.splits("val")


def _row(group: RolloutGroup) -> dict[str, Any]:
    """Returns a row of the table of completions: a problem and its first rollout."""
    rollout = group.rollouts[0]
    return {
        **({"set": group.problem.set} if group.problem.set else {}),
        "problem": group.problem.text,
        "completion": rollout.text,
        "correct": rollout.correct,
        "extracted": rollout.verdict.answer,
        "answer": group.problem.answer,
        "status": "truncated" if rollout.truncated else rollout.verdict.status,
        "tokens": len(rollout.completion.token_ids),
        "group_accuracy": len(group.successes) / len(group.rollouts),
    }
