"""A lock on a file of its folder allows one run per folder."""

from __future__ import annotations

import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ogls.system.exits import FolderInUse


def lock_folder(folder: Path) -> FileLock:
    """Returns the held lock on the file `lock` of a run's folder. The kernel frees it however its holder ends.

    Raises:
        FolderInUse: another holds it; the message names process, host and time.
        ValueError: the folder cannot be made, since there is a file.
    """
    file = folder / "lock"
    # Any thread may release it; a filesystem without flock is an error, since a lock made of a file would stay behind.
    lock = FileLock(file, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder.parent} is a file: expected a folder, which holds one folder per run") from None
    except Timeout:
        raise FolderInUse(f"{folder} is in use by {file.read_text() or 'another process'}") from None
    file.write_text(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%c}")
    return lock
