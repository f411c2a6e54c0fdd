"""What a source of problems is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from ogls.records import Problem


class ProblemSource(ABC):
    """A fixed sequence of problems: the same index gives the same problem, in every process and on every day."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Problem:
        """The problem at `index`; IndexError beyond the end."""

    def __iter__(self) -> Iterator[Problem]:
        return (self[index] for index in range(len(self)))
