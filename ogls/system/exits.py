"""Each reason to end a run early is an exception with its own exit code.

    0     the run has finished
    1     the program has an error, or training could not go on
    2     configuration or data cannot work
    73    the run's folder is in use
    74    the disk is full or may not be written to, or three checkpoints in a row could not be written
    75    the engine failed, and failed again after it was rebuilt
    130   Ctrl-C
    143   SIGTERM

After 130 and 143, and after a 75 between two steps, there is a checkpoint of the last step.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class RunEnded(RuntimeError):
    """The run has ended although the program has no error; the message tells its user why."""

    exit_code: ClassVar[int] = 1


class FolderInUse(RunEnded):
    """Another run uses the run's folder."""

    exit_code = 73


class DiskFailed(RunEnded):
    """The disk is full or may not be written to, or checkpoints could not be written several times in a row."""

    exit_code = 74


def unwritable(error: OSError) -> bool:
    """Returns whether the cause is a disk that is full, over its quota, or may not be written to."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class EngineFailed(RunEnded):
    """The engine failed, and failed again after it was rebuilt."""

    exit_code = 75
