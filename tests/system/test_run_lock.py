from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ogls.system.exits import FolderInUse
from ogls.system.run_lock import lock_folder
from tests.faults.nursery import Nursery


@pytest.mark.fault("two runs in one folder")
def test_of_two_runs_one_wins(nursery: Nursery, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    for race in range(20):
        go = time.time() + 0.03
        runners = [nursery.fork("race", tmp_path / str(race), go) for _ in range(2)]
        assert sorted(nursery.wait(runner) for runner in runners) == [0, 73], race
    record_property("tried", 20)


@pytest.mark.fault("two runs in one folder")
def test_the_loser_names_the_owner_and_its_end_frees_the_folder(tmp_path: Path) -> None:
    first = lock_folder(tmp_path)
    with pytest.raises(FolderInUse, match=f"{tmp_path} is in use by process {os.getpid()} on .* since"):
        lock_folder(tmp_path)
    releasing = threading.Thread(target=first.release)  # as an end of the run may do from any thread
    releasing.start()
    releasing.join()
    first.release()
    lock_folder(tmp_path).release()


@pytest.mark.fault("two runs in one folder")
def test_the_lock_of_a_killed_run_is_free(nursery: Nursery, tmp_path: Path) -> None:
    process = nursery.fork("hold", tmp_path)
    deadline = time.monotonic() + 10
    while not (tmp_path / "lock").exists() or not (tmp_path / "lock").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process, 9)
    nursery.wait(process)
    lock_folder(tmp_path).release()


@pytest.mark.fault("two runs in one folder")
def test_a_filesystem_without_locks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: int) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(OSError, match="no locks here"):
        lock_folder(tmp_path)
