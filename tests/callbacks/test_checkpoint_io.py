"""Checkpoints: whole or absent, and known to be damaged when they are."""

from __future__ import annotations

import errno
import os
import pickle
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ogls.callbacks.checkpoint_io import SoundCheckpoints, newest_sound, read_manifest, write
from ogls.system.exits import DiskFailed
from tests.faults.nursery import Nursery

STATE = {
    "global_step": 7,
    "state_dict": {"a": torch.arange(20_000.0), "b": torch.ones(3, 4, dtype=torch.bfloat16)},
    "ogls": {"policy_version": 7, "tokenizer": "abc", "teacher": {}},
    "mlflow_run_id": None,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(STATE, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_what_was_written_comes_back_and_the_manifest_says_what_it_is(file: Path) -> None:
    manifest = read_manifest(file)
    assert {
        "global_step": 7,
        "policy_version": 7,
        "tokenizer": "abc",
        "mlflow_run_id": None,
    }.items() <= manifest.items()
    assert {"state_dict", "teacher"} <= set(manifest["holds"])
    for loaded in (SoundCheckpoints().load_checkpoint(file), torch.load(file, weights_only=True)):
        assert torch.equal(loaded["state_dict"]["a"], STATE["state_dict"]["a"])
        assert torch.equal(loaded["state_dict"]["b"], STATE["state_dict"]["b"])
        assert loaded["ogls"] == STATE["ogls"]
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def flip(file: Path, at: int, bit: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= bit
    file.write_bytes(data)


@pytest.mark.fault("checkpoint damaged: cut, bit flipped, empty, missing, foreign")
def test_every_flipped_bit_is_found(file: Path, record_property: Callable[[str, object], None]) -> None:
    rng, size, whole = random.Random(0), file.stat().st_size, file.read_bytes()
    places = [0, 1, 64, size - 1, size - 20, size - 200, size - 400, *(rng.randrange(size) for _ in range(40))]
    for at in places:
        flip(file, at, 1 << rng.randrange(8))
        with pytest.raises(ValueError, match=r"last.ckpt (is damaged|is no whole checkpoint|has no manifest)"):
            read_manifest(file)
        file.write_bytes(whole)
    record_property("tried", len(places))


def cut_to(size: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, size if size >= 0 else file.stat().st_size + size)


@pytest.mark.fault("checkpoint damaged: cut, bit flipped, empty, missing, foreign")
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_to(0), "its end is missing"),
        (cut_to(1000), "its end is missing"),
        (cut_to(-1), "its end is missing"),
        (Path.unlink, "cannot be read: .*No such file"),
        (lambda file: torch.save(STATE, file), "has no manifest"),
        (lambda file: file.write_bytes(os.urandom(5000)), "its end is missing"),
        (lambda file: file.write_bytes(file.read_bytes() * 2), "is damaged"),
    ],
    ids=["empty", "cut", "a byte short", "missing", "foreign", "noise", "doubled"],
)
def test_a_damaged_checkpoint_is_an_error_and_never_the_newest(
    file: Path, damage: Callable[[Path], Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    older = file.with_name("previous.ckpt")
    os.link(file, older)
    file.unlink()
    write(STATE, file)
    os.utime(older, (1, 1))
    damage(file)
    with pytest.raises(ValueError, match=reason):
        SoundCheckpoints().load_checkpoint(file)
    if file.exists():
        assert newest_sound([file, older]) == older
        assert "Passed over" in capsys.readouterr().err
        assert newest_sound([file]) is None


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


@pytest.mark.fault("code in a checkpoint or a model")
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write({"global_step": 1, "state_dict": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        SoundCheckpoints().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "executed").exists()


@contextmanager
def disk_ends_at(size: int) -> Iterator[None]:
    """The kernel refuses to write files beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.fault("disk full while a checkpoint is written")
@pytest.mark.parametrize("size", [0, 100, 30_000, 80_000])
def test_a_full_disk_leaves_the_previous_checkpoint_and_the_third_time_ends_the_run(
    file: Path, size: int, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    before, writer = file.read_bytes(), SoundCheckpoints()
    for failed in (1, 2):
        with disk_ends_at(size):
            writer.save_checkpoint(STATE, file)
        assert writer.failed == failed
    assert "the previous one is as it was" in capsys.readouterr().err
    with disk_ends_at(size), pytest.raises(DiskFailed, match="3rd time in a row") as caught:
        writer.save_checkpoint(STATE, file)
    assert caught.value.exit_code == 74
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]
    writer.save_checkpoint(STATE, file)
    assert writer.failed == 0
    record_property("tried", 3)


@pytest.mark.fault("disk full while a checkpoint is written")
def test_no_space_is_such_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before, writer = file.read_bytes(), SoundCheckpoints()
    monkeypatch.setattr(os, "fsync", full)
    writer.save_checkpoint(STATE, file)
    assert writer.failed == 1
    assert file.read_bytes() == before


@pytest.mark.fault("kill -9 while a checkpoint is written")
def test_after_fifty_kills_there_is_always_a_whole_checkpoint(
    nursery: Nursery, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    rng, file, killed_in_draft = random.Random(0), tmp_path / "last.ckpt", 0
    write({"global_step": 0, "state_dict": {}}, file)
    for _ in range(50):
        process = nursery.fork("save_for_ever", file)
        time.sleep(0.02 + 0.05 * rng.random())
        os.kill(process, 9)
        assert nursery.wait(process) == -9
        killed_in_draft += len(list(tmp_path.iterdir())) > 1
        step = read_manifest(file)["global_step"]
        tensors = SoundCheckpoints().load_checkpoint(file)["state_dict"]
        assert all(bool((tensor == step).all()) for tensor in tensors.values())
    assert killed_in_draft >= 5  # the kills came where it matters
    record_property("figure", f"{killed_in_draft} of 50 kills left a draft behind")
    record_property("tried", 50)
