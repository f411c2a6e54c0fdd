"""How a run ends before its time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage

from ogls.callbacks.best import BestCheckpoint
from ogls.exits import EngineFailed
from ogls.tracking import Tracker


class GracefulStop(Callback):
    """The first SIGTERM or Ctrl-C ends training after the step under way, with a checkpoint; a second at once.

    Exit codes: 143 after SIGTERM, 130 after Ctrl-C; MLflow's state is KILLED. A validation that is due is made first.
    Lightning's own handler of SIGTERM makes its loops raise between two steps, and that does the stopping: this
    callback calls it at the right time, writes the checkpoint and sets the exit code. Outside of training there is
    nothing to save, and the first signal ends the stage.

    A checkpoint is also written when the engine fails between two steps. In a validation it would make the run go on
    without that validation, so there the last one stands.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._running = self._training = self._stopping = False
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._received, self._running = None, _in_main_thread()
        if _in_main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != self._on_signal:
                    self._previous[number] = signal.signal(number, self._on_signal)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = True
        if _in_main_thread():  # Lightning has put its handler before ours; from here on we call it
            self._lightning: Any = signal.signal(signal.SIGTERM, self._on_signal)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._received is not None and not trainer.is_last_batch:
            self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._received is not None:  # after the validation
            self._stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._running = False  # Lightning puts back the handlers it found, which are ours: they only pass on from here

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._running:
            self._pass_on(number, frame)
        elif self._stopping:
            return  # Lightning's handler calls ours
        elif self._received is not None:
            os._exit(128 + number)
        else:
            self._received = number
            if not self._training:
                sys.exit(128 + number)
            os.write(2, b"\nStopping after this step; once more stops at once.\n")  # print may be what was interrupted

    def _stop(self) -> None:
        self._stopping = True
        self._lightning(signal.SIGTERM, None)
        self._stopping = False

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous[number]
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._running = False
        if self._received is not None and isinstance(exception, SystemExit):
            exception.code = 128 + self._received
            between_steps = True
            if isinstance(trainer.logger, Tracker):
                trainer.logger.end_as("KILLED")
        else:
            between_steps = isinstance(exception, EngineFailed) and trainer.state.stage == RunningStage.TRAINING
        checkpoint = trainer.checkpoint_callback
        if self._training and between_steps and isinstance(checkpoint, BestCheckpoint):
            print(f"Saved {checkpoint.save_last_now(trainer)}; to go on: fit ... --ckpt_path last", file=sys.stderr)
        self._training = False


def _in_main_thread() -> bool:
    """Only there can handlers be set."""
    return threading.current_thread() is threading.main_thread()
