"""Two processes on gloo make the steps that one makes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ogls.checkpoint import read_manifest
from ogls.ranks import Ranks
from ogls.tracking.files import METRICS, read_rows
from tests.faults.nursery import Nursery


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rows(folder: Path) -> list[dict[str, float]]:
    return read_rows(folder / "small-s0-run" / METRICS)


def test_shares_cover_everything_once() -> None:
    items = list(range(7))
    shares = [Ranks(rank, 3).share(items) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    alone = Ranks()
    assert alone.joined(items) == alone.share(items) == items
    assert alone.summed([1.5, 2.0]) == [1.5, 2.0]
    assert alone.averaged({"a": 1.0}) == {"a": 1.0}


def test_two_processes_are_one(nursery: Nursery, tiny_model: Path, tmp_path: Path) -> None:
    alone, together, port = tmp_path / "alone", tmp_path / "together", free_port()
    for folder in (alone, together):
        folder.mkdir()
    assert nursery.wait(nursery.fork("train_as", tiny_model, alone, 0, 1, port)) == 0
    both = [nursery.fork("train_as", tiny_model, together, rank, 2, port) for rank in (0, 1)]
    assert [nursery.wait(process) for process in both] == [0, 0]

    expected = load_file(alone / "weights-0.safetensors")
    first, second = (load_file(together / f"weights-{rank}.safetensors") for rank in (0, 1))
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
        assert torch.equal(first[name], second[name])
    for name in ("train/loss", "train/grad_norm", "val/avg_at_2"):
        one, two = ({row["step"]: row[name] for row in rows(folder) if name in row} for folder in (alone, together))
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6), name
    assert [path.name for path in together.iterdir() if path.is_dir()] == ["small-s0-run"]
    assert read_manifest(together / "small-s0-run/checkpoints/last.ckpt")["global_step"] == 8


@pytest.mark.fault("one of two processes is killed")
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_dies_the_other_ends(
    killed: int, nursery: Nursery, tiny_model: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    port = free_port()
    deaths = [("3",) if rank == killed else () for rank in (0, 1)]
    both = [nursery.fork("train_as", tiny_model, tmp_path, rank, 2, port, *deaths[rank]) for rank in (0, 1)]
    assert nursery.wait(both[killed]) == -9
    start = time.monotonic()
    assert nursery.wait(both[1 - killed]) not in (0, -9)
    assert time.monotonic() - start < 60
    assert not Path(f"/proc/{both[1 - killed]}").exists()
    assert read_manifest(tmp_path / "small-s0-run/checkpoints/last.ckpt")["global_step"] in (2, 3)
    assert not any(name.startswith("weights") for name in os.listdir(tmp_path))
