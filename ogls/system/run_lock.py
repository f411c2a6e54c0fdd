"""One run a folder."""

from __future__ import annotations

import fcntl
import os
import socket
from datetime import datetime
from pathlib import Path

from ogls.system.exits import FolderInUse


class RunLock:
    """A lock on the file `lock` of a run's folder. The kernel gives it back however its holder ends: none is stale."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self, folder: Path) -> None:
        """FolderInUse, naming the holder, if another has it."""
        assert not self.held, "this lock is held already"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise FolderInUse(f"{folder} is in use by {owner}") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%c}".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Does nothing where nothing is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
