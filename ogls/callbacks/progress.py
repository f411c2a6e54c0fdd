"""Progress is shown as a bar in a terminal, and as one line per step elsewhere."""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from ogls.records import RolloutGroup
from ogls.tracking.files import OF_SET, SUBSET, WHOLE, with_interval

_TEST = re.compile(r"test/avg_at_\d+")
_PHASES = ("generate", "grade", "reflect", "teacher", "student", "sync", "wait")


class StepProgress(RichProgressBar):
    """StepProgress shows step, loss, accuracy, the last validation, the time left, and the seconds of each phase.

    In a terminal they stand beside Lightning's bar over the steps of an epoch; elsewhere each step prints one line.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=int(sys.stdout.isatty()))
        _quieten_lightning()
        self._shown: dict[str, int | str | float | dict[str, float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first = trainer.global_step
        self._begun = self._clock = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        left = (self._clock - self._begun) / max(1, step - self._first) * (total - step)
        values = outputs["row"]
        self._shown |= {
            "step": f"{step}/{total}",
            **{name: f"{values[f'train/{name}']:.4g}" for name in ("loss", "accuracy") if f"train/{name}" in values},
            "left": str(timedelta(seconds=round(left))),
            "seconds": f"{seconds:.1f} = {phases(values)}",
        }
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.is_global_zero and not self.is_enabled:
            print("  ".join(f"{name} {value}" for name, value in self._shown.items()), flush=True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Sequence[RolloutGroup],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        show = cast(Any, trainer).datamodule.evaluation.show
        if show and dataloader_idx == 0 and trainer.is_global_zero:
            some = batch[:: max(1, len(batch) // show)][:show]
            self.print("".join(map(shown, some)), end="")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer, pl_module)
        super().on_validation_end(trainer, pl_module)
        self._clock = time.monotonic()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer, pl_module)
        super().on_test_end(trainer, pl_module)

    def _tell(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what a validation or test found: amid training its accuracies, elsewhere all figures."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # Of a whole validation its own figure, not that of its subset.
        accuracy = next((name for kind in (_TEST, WHOLE, SUBSET) for name in values if kind.fullmatch(name)), None)
        if accuracy is not None and not trainer.sanity_checking and trainer.is_global_zero:
            split = accuracy.partition("/")[0]
            self._shown[split] = f"{values[accuracy]:.3f}"
            fits = trainer.state.fn == TrainerFn.FITTING
            step = cast(Any, pl_module).policy.version
            which = "" if fits or trainer.ckpt_path is None else f"{trainer.ckpt_path}, "
            self.print(f"{which}after step {step}: {accuracy} {with_interval(values, accuracy)}")
            alone = not fits and not cast(Any, trainer).datamodule.fit_follows  # then all figures are what is wanted
            for name in values:
                end = name.endswith(("_low", "_high")) or name == accuracy
                if name.startswith(f"{split}/") and not end and (alone or OF_SET.fullmatch(name)):
                    self.print(f"  {name} {with_interval(values, name)}")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar, or as any other line where there is none."""
        if self.progress is None:
            print(*args, **kwargs, flush=True)
        else:
            self.progress.console.print(*args, **kwargs, markup=False, highlight=False)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Returns what stands beside the bar; the phases would not fit into its line."""
        return {name: value for name, value in self._shown.items() if name != "seconds"}


def shown(group: RolloutGroup) -> str:
    """Returns a problem, its first rollout and the verdict as text."""
    rollout, problem = group.rollouts[0], group.problem
    status = "cut off" if rollout.truncated else rollout.verdict.status
    verdict = "right" if rollout.correct else "wrong" if status == "graded" else f"wrong ({status})"
    said = f"{verdict}: answer {rollout.verdict.answer}, expected {problem.answer}"
    said += f"; {len(group.successes)} of {len(group.rollouts)} right"
    return f"\n> {problem.name}: {problem.text}\n{rollout.text}\n--- {said}\n"


def phases(values: dict[str, float]) -> str:
    """Returns the seconds of each measured phase as text."""
    measured = ((name, values.get(f"time/{name}")) for name in _PHASES)
    return " + ".join(f"{name} {seconds:.1f}" for name, seconds in measured if seconds is not None)


def _quieten_lightning() -> None:
    """Silences notes of Lightning that do not concern a run.

    They are about absent accelerators, products, and loaders of fixed data, whereas rollouts are a stream whose order
    and seeds follow from the step.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.* is deprecated",
        ".*does not have many workers",
        ".*your dataloader is not resumable",
        "Checkpoint directory .* exists and is not empty",  # a run that goes on
        ".*sync_dist=True",  # vLLM in this process has set up torch.distributed for itself
        ".*module\\(s\\) in eval mode",  # the policy has no dropout: there is no mode to be in
        ".*overridden `transfer_batch_to_device`",
        "Total length of `list`",
    ):
        warnings.filterwarnings("ignore", message=message)
