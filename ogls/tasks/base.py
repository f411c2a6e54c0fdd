"""What a task consists of: where problems come from, which answers are right, and where an attempt first goes wrong."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

from ogls.records import Problem, Span, Verdict
from ogls.system.seeds import derive


class ProblemSource(ABC):
    """A fixed sequence of problems: the same index gives the same problem, in every process and on every day."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Problem:
        """The problem at `index`; IndexError beyond the end."""

    def __iter__(self) -> Iterator[Problem]:
        return (self[index] for index in range(len(self)))

    @property
    def origin(self) -> str:
        """The class that the problems come from."""
        return type(self).__name__

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many problems were left out, by reason."""
        return {}


@dataclass(frozen=True)
class Kept(ProblemSource):
    """The problems of a source that are left when some are dropped.

    Args:
        source: all problems.
        indices: places of those that are kept, in order.
        counts: how many were left out, by reason.
    """

    source: ProblemSource
    indices: tuple[int, ...]
    counts: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Problem:
        return self.source[self.indices[index]]

    @property
    def origin(self) -> str:
        return self.source.origin

    @property
    def dropped(self) -> Mapping[str, int]:
        return self.counts


class Verifier(ABC):
    """Judges a text against a problem's gold answer: a pure function of the two.

    Texts are untrusted and some verifiers hand parts of them to large parsers, so training calls verifiers through
    `ogls.tasks.grading.GradingPool` only. A verifier travels to the pool's processes by pickle: keep it a frozen
    dataclass in an importable module, and import what is heavy inside its methods.
    """

    @abstractmethod
    def grade(self, problem: Problem, text: str) -> Verdict:
        """Correct or not, and the answer that was found; status "unparsable" where there is none to compare."""

    @abstractmethod
    def canonical(self, problem: Problem) -> str:
        """The shortest text that states the gold answer as a completion should; it has to be graded correct."""

    def gold_key(self, problem: Problem) -> Hashable:
        """What of a problem its verdicts depend on: gold answers of one key are checked once. All of it by default."""
        return problem

    def warm_up(self) -> None:  # noqa: B027  most verifiers have nothing heavy to import
        """Import what `grade` needs. Called once, before the pool's workers are forked."""


class ErrorLocator(ABC):
    """Finds the first error of a wrong rollout."""

    @abstractmethod
    def locate(self, problem: Problem, text: str) -> Span | None:
        """Characters [start, end) of the first error in `text`; None where none could be found."""


def drawn(source: ProblemSource, count: int, draw: int, seed: int) -> list[Problem]:
    """Problems draw*count ... draw*count + count-1 of an endless sequence of shuffled passes over the source."""
    size, first = len(source), draw * count
    orders: dict[int, list[int]] = {}
    for lap in range(first // size, (first + count - 1) // size + 1):
        orders[lap] = random.Random(derive(seed, "order", lap)).sample(range(size), size)
    return [source[orders[p // size][p % size]] for p in range(first, first + count)]
