"""Why a run ended before its time, as exceptions with the exit code of the process.

The codes: 0 finished; 1 an error in the program; 2 configuration or data that cannot work; 73 the run's folder is in
use; 74 checkpoints could not be written, three times in a row; 75 the engine failed, and again after it was rebuilt;
130 Ctrl-C; 143 SIGTERM. After the last three, and 75 between two steps, there is a checkpoint of the last step.
"""

from __future__ import annotations

from typing import ClassVar


class RunEnded(RuntimeError):
    """Nothing is wrong with the program: the message is for whoever runs it."""

    exit_code: ClassVar[int] = 1


class FolderInUse(RunEnded):
    exit_code = 73


class DiskFailed(RunEnded):
    exit_code = 74


class EngineFailed(RunEnded):
    exit_code = 75
