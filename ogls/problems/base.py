"""What a source of problems is."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator

from ogls.records import Problem
from ogls.seeds import derive


class ProblemSource(ABC):
    """A fixed sequence of problems: the same index gives the same problem, in every process and on every day."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Problem:
        """The problem at `index`; IndexError beyond the end."""

    def __iter__(self) -> Iterator[Problem]:
        return (self[index] for index in range(len(self)))


def drawn(source: ProblemSource, count: int, draw: int, seed: int) -> list[Problem]:
    """Problems draw*count ... draw*count + count-1 of an endless sequence of shuffled passes over the source."""
    size, first = len(source), draw * count
    orders: dict[int, list[int]] = {}
    for lap in range(first // size, (first + count - 1) // size + 1):
        orders[lap] = random.Random(derive(seed, "order", lap)).sample(range(size), size)
    return [source[orders[p // size][p % size]] for p in range(first, first + count)]
