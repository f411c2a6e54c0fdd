"""Callbacks act around a run: its record, checkpoints, display and end."""

from ogls.callbacks.best import BestCheckpoint
from ogls.callbacks.progress import StepProgress
from ogls.callbacks.recorder import RunRecorder
from ogls.callbacks.rollouts import RolloutWriter
from ogls.callbacks.stop import GracefulStop
from ogls.callbacks.stop_without_signal import StopWithoutSignal

__all__ = ["BestCheckpoint", "GracefulStop", "RolloutWriter", "RunRecorder", "StepProgress", "StopWithoutSignal"]
