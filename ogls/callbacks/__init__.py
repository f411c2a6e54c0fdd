"""Callbacks act around a run: its record, checkpoints, display and end."""

from ogls.callbacks.best import BestCheckpoint
from ogls.callbacks.exhibits import RunExhibits
from ogls.callbacks.progress import StepProgress
from ogls.callbacks.recorder import RunRecorder
from ogls.callbacks.rollouts import RolloutWriter
from ogls.callbacks.stop import GracefulStop
from ogls.callbacks.stop_without_signal import StopWithoutSignal
from ogls.callbacks.traces import RolloutTraces

__all__ = [
    "BestCheckpoint",
    "GracefulStop",
    "RolloutTraces",
    "RolloutWriter",
    "RunExhibits",
    "RunRecorder",
    "StepProgress",
    "StopWithoutSignal",
]
