"""GracefulStop ends a run early without losing the step under way."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage

from ogls.callbacks.best import BestCheckpoint
from ogls.system.exits import EngineFailed
from ogls.tracking import tracker_of


class GracefulStop(Callback):
    """GracefulStop ends training after the step under way at the first SIGTERM or Ctrl-C, and at once at a second.

    At the first signal, a validation that is due is made and a checkpoint written. The exit code is 143 after SIGTERM
    and 130 after Ctrl-C, and MLflow's state is KILLED. A run whose last step was under way ends as if there had been no
    signal. Outside of training there is nothing to save, so the first signal ends the stage at once.

    Lightning's loops raise between two steps once Lightning has noted a SIGTERM. This callback makes that note at the
    right time, writes the checkpoint and sets the exit code.

    Of several processes, all stop after the same step, whichever received the signal. All but the first then end with
    code 0: Lightning kills the first when another fails, and the first may still be writing to MLflow.

    A checkpoint is also written when the engine fails between two steps. When it fails in a validation, none is
    written, because a run that goes on from it would skip that validation.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._running = self._training = self._agreed = False
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over the handling of SIGTERM and Ctrl-C, and has a crash in native code print every thread's stack."""
        faulthandler.disable()  # the handler that it is may be gone: Lightning's end of a stage puts back Python's own
        faulthandler.enable(file=2)
        self._received, self._agreed, self._running = None, False, _in_main_thread()
        if _in_main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != self._on_signal:
                    self._previous[number] = signal.signal(number, self._on_signal)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = True
        if _in_main_thread():  # Lightning has put its handler before ours
            signal.signal(signal.SIGTERM, self._on_signal)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.is_last_batch:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fit_loop.done:  # a run that is complete ends as such
            self._stop_if_asked(trainer)  # after the validation

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._running = False  # Lightning puts back the handlers it found, which are ours: they only pass on from here

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._running:
            self._pass_on(number, frame)
        elif self._received is not None:
            os._exit(128 + number)
        else:
            self._received = number
            if not self._training:
                sys.exit(128 + number)
            os.write(2, b"\nStopping after this step; once more stops at once.\n")  # print may be what was interrupted

    def _stop_if_asked(self, trainer: Trainer) -> None:
        self._agreed = trainer.strategy.reduce_boolean_decision(self._received is not None, all=False)
        if self._agreed:
            trainer._signal_connector.received_sigterm = True

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous[number]
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Sets the exit code, and writes the checkpoint where the run can go on from the step before."""
        self._running = False
        if (self._received is not None or self._agreed) and isinstance(exception, SystemExit):
            exception.code = 128 + (self._received or signal.SIGTERM) if trainer.is_global_zero else 0
            between_steps = True
            if tracker := tracker_of(trainer):
                tracker.end_as("KILLED")
        else:
            between_steps = isinstance(exception, EngineFailed) and trainer.state.stage == RunningStage.TRAINING
        checkpoint = trainer.checkpoint_callback
        if self._training and between_steps and isinstance(checkpoint, BestCheckpoint):
            saved = checkpoint.save_last_now(trainer)
            if saved is not None and trainer.is_global_zero:
                print(f"Saved {saved}; to go on: fit ... --ckpt_path last", file=sys.stderr)
        self._training = False


def _in_main_thread() -> bool:
    """Returns whether this is the main thread, the only one that may set signal handlers."""
    return threading.current_thread() is threading.main_thread()
