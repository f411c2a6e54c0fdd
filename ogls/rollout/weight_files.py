"""Weights are written to files that another machine can read before it is told of them."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psutil
from safetensors.torch import save_file

if TYPE_CHECKING:
    from torch import Tensor

_PART = 2 << 30  # bytes per file: no more of them are in memory at a time


def new_folder(parent: Path) -> TemporaryDirectory[str]:
    """Returns a new folder that all users may read, and removes those of processes of this machine that are gone."""
    host = socket.gethostname()
    for old in parent.glob(f"ogls-weights-{host}-*"):
        if not psutil.pid_exists(int(old.name.removeprefix(f"ogls-weights-{host}-").partition("-")[0])):
            shutil.rmtree(old, ignore_errors=True)
    made = TemporaryDirectory(prefix=f"ogls-weights-{host}-{os.getpid()}-", dir=parent)
    Path(made.name).chmod(0o755)
    return made


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, part: int = _PART) -> None:
    """Writes weights as safetensors of about `part` bytes each; all is on the disk, or an OSError is raised."""
    waiting: dict[str, Tensor] = {}
    number = size = 0
    for name, value in weights:
        if waiting and size + value.nbytes > part:
            save_file(waiting, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
            waiting, number, size = {}, number + 1, 0
        waiting[name] = value.detach().to("cpu").contiguous()
        size += value.nbytes
    save_file(waiting, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    settle(folder)


def settle(folder: Path) -> None:
    """Waits until the files of a folder are on the disk, then the folder: a network's disk may show it first."""
    for file in sorted(folder.iterdir()):
        _sync(file)
    _sync(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
