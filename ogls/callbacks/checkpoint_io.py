"""Checkpoints are whole or absent, and each says itself whether it is sound.

A checkpoint is the zip archive that `torch.save` writes. The archive's comment holds a sha256 and, after a line feed, a
manifest in JSON (`unzip -z last.ckpt` shows both). The sha256 is that of the archive without its comment, followed by
the manifest. One file takes one rename, so a kill never leaves a file and a manifest that do not belong together.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import CheckpointIO

from ogls.system.exits import DiskFailed

_TOLERATED = 2  # failed saves in a row
_END = b"PK\x05\x06"  # a zip archive's last record: 22 bytes, of which the last two count those of the comment
_BLOCK = 1 << 20


class SoundCheckpoints(CheckpointIO):
    """SoundCheckpoints writes a file beside the target, syncs it and renames it. It reads nothing damaged and no code.

    Where the disk refuses a save, the previous checkpoint stays as it was and the run goes on. `failed` counts such
    saves in a row. The third one raises DiskFailed, which ends the run.
    """

    def __init__(self) -> None:
        self.failed = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            write(checkpoint, Path(path))
        except OSError as error:
            self.failed += 1
            message = f"{path} was not written ({error}); the previous one is as it was"
            if self.failed > _TOLERATED:
                raise DiskFailed(f"{message}. This was the {self.failed}rd time in a row") from error
            with suppress(OSError):  # stderr may go to the same disk
                print(message, file=sys.stderr, flush=True)
        else:
            self.failed = 0

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Returns tensors and plain values only, whatever `weights_only` says. The file is mapped, not read.

        Raises:
            ValueError: the checkpoint is not sound.
        """
        read_manifest(Path(path))
        return torch.load(path, map_location=map_location, weights_only=True, mmap=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint to the disk. At any time, `path` is the previous file or this one, and whole.

    Raises:
        OSError: the disk refuses, and the previous file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            archive = _Archive(file)
            torch.save(checkpoint, archive)  # pyright: ignore[reportArgumentType] - it needs `write` alone
            if archive.error is not None:
                raise archive.error
            text = json.dumps(manifest(checkpoint)).encode()
            archive.digest.update(text)
            comment = archive.digest.hexdigest().encode() + b"\n" + text
            file.seek(-2, os.SEEK_CUR)
            file.write(len(comment).to_bytes(2, "little") + comment)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def manifest(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the names of a checkpoint's entries, and the values that are text or numbers, such as step and hashes."""
    values = {**checkpoint, **checkpoint.get("ogls", {})}
    plain = {name: value for name, value in values.items() if value is None or isinstance(value, str | int | float)}
    return {**plain, "holds": sorted(values)}


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of a sound checkpoint. Raises ValueError that says what is wrong with any other file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 16) - 22))
            tail = file.read()
            at = tail.rfind(_END)
            comment = tail[at + 22 :]
            if at < 0 or int.from_bytes(tail[at + 20 : at + 22], "little") != len(comment):
                raise ValueError(f"{path} is no whole checkpoint: its end is missing")
            wanted, _, text = comment.partition(b"\n")
            digest = sha256()
            file.seek(0)
            left = size - len(comment) - 2
            while left:
                block = file.read(min(left, _BLOCK))
                digest.update(block)
                left -= len(block)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not text:
        raise ValueError(f"{path} has no manifest: it was not written by this program")
    digest.update(b"\0\0" + text)
    if digest.hexdigest().encode() != wanted:
        raise ValueError(f"{path} is damaged: its sha256 is {digest.hexdigest()}, expected {wanted.decode('latin1')}")
    return json.loads(text)


def policy_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the trained weights that a checkpoint holds, by the policy's own names."""
    return {name.removeprefix("policy."): weight for name, weight in checkpoint["state_dict"].items()}


def newest_sound(paths: Iterable[Path]) -> Path | None:
    """Returns the sound checkpoint that is furthest on, of equals the last written; says which are passed over."""
    sound: list[tuple[int, float, Path]] = []
    for path in paths:
        try:
            sound.append((int(read_manifest(path).get("global_step") or 0), path.stat().st_mtime, path))
        except ValueError as error:
            print(f"Passed over: {error}", file=sys.stderr, flush=True)
    return max(sound, default=(0, 0.0, None))[2]


class _Archive:
    """torch.save writes to this file and hash. `error` keeps an exception, since none may pass through torch's C++."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Does nothing, since the file is flushed when it is complete."""
