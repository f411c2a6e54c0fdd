"""Processes that train together are started, and what they leave is compared."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import torch

from tests.faults.nursery import Nursery


class Ranks:
    """Forks processes that train together, and reads what they leave."""

    def __init__(self, nursery: Nursery, model: Path, place: Path, function: str = "train_sharded") -> None:
        self.nursery, self.model, self.place, self.function = nursery, model, place, function

    def run(self, folder: str, size: int, case: str, **settings: Any) -> Path:
        """Folder of what `size` processes leave, all of which end well."""
        place, codes = self.start(folder, size, case, **settings)
        assert codes == [0] * size
        return place

    def start(self, folder: str, size: int, case: str, **settings: Any) -> tuple[Path, list[int]]:
        place = self.place / folder
        place.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
        forked = [
            self.nursery.fork(self.function, self.model, place, rank, size, port, case, *given) for rank in range(size)
        ]
        return place, [self.nursery.wait(process) for process in forked]


def told(place: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((place / f"told-{rank}.json").read_text())


def gap(place: Path, other: Path, name: str = "weights.pt") -> float:
    """Largest difference of two runs' weights."""
    ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (place, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[key].float() - theirs[key].float()).abs().max()) for key in ours)


def losses_gap(place: Path, other: Path, rank: int = 0) -> float:
    rows = zip(told(place, rank)["rows"], told(other)["rows"], strict=True)
    return max(abs(row["train/loss"] - wanted["train/loss"]) for row, wanted in rows)
