"""A task is a source of problems, a verifier of answers, a locator of errors."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ogls.records import Problem, Span, Verdict
from ogls.system.seeds import derive

_SET_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class ProblemSource(ABC):
    """A problem source is a fixed sequence of problems.

    The same index gives the same problem, in every process and on every day.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Problem:
        """Returns the problem at `index`. Raises IndexError beyond the end."""

    def __iter__(self) -> Iterator[Problem]:
        return (self[index] for index in range(len(self)))

    @property
    def origin(self) -> str:
        """Returns the class that the problems come from."""
        return type(self).__name__

    @property
    def dropped(self) -> Mapping[str, int]:
        """Returns how many problems were left out, by reason."""
        return {}

    @property
    def sets(self) -> Mapping[str, ProblemSource]:
        """Returns the sets that the source is made of, by name; none where it is a single one."""
        return {}

    def splits(self, name: str) -> dict[str, ProblemSource]:
        """Returns what is to be told apart under the name of a split: ``val``, or ``val/math``, ``val/science``."""
        return {f"{name}/{of_set}": source for of_set, source in self.sets.items()} or {name: self}


class ProblemSets(ProblemSource):
    """Problem sets are several sources, one after another, whose problems know the name of their set.

    Args:
        sets: sources by the names of their sets, which become part of the names of metrics

    Raises:
        ValueError: a name cannot be part of a metric's name.
    """

    def __init__(self, sets: Mapping[str, ProblemSource]) -> None:
        for name in sets:
            if not _SET_NAME.fullmatch(name):
                raise ValueError(f"a set's name becomes part of metrics: expected {_SET_NAME.pattern}, got {name!r}")
        self._sets = dict(sets)

    def __len__(self) -> int:
        return sum(map(len, self._sets.values()))

    def __getitem__(self, index: int) -> Problem:
        for name, source in self._sets.items():
            if index < len(source):
                return replace(source[index], set=name)
            index -= len(source)
        raise IndexError(index)

    @property
    def sets(self) -> Mapping[str, ProblemSource]:
        """Returns the sets by name."""
        return self._sets


@dataclass(frozen=True)
class Kept(ProblemSource):
    """Kept are the problems of a source that are left when some are dropped.

    Args:
        source: source of all problems
        indices: places of those that are kept, in order
        counts: number of those that were left out, by reason
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
        """Returns the class that all problems come from."""
        return self.source.origin

    @property
    def dropped(self) -> Mapping[str, int]:
        """Returns how many problems were left out, by reason."""
        return self.counts


class Verifier(ABC):
    """A verifier judges a text against a problem's gold answer; the verdict depends on nothing else.

    Texts are untrusted, and some verifiers hand parts of them to large parsers. Training therefore calls verifiers only
    through `ogls.tasks.grading.GradingPool`. A verifier travels to the pool's processes by pickle: it has to be a
    frozen dataclass in an importable module, and to import large packages inside its methods.

    Attributes:
        tells_answers: whether a verdict says which answer a text gives, so that answers can be counted
    """

    tells_answers: ClassVar[bool] = True

    @abstractmethod
    def grade(self, problem: Problem, text: str) -> Verdict:
        """Returns whether the text is right, and the answer found; status ``unparsable`` where none was found.

        `Verdict.feedback` may say more, as long as it does not tell the gold answer: `ogls.lessons.feedback` shows it
        to the teacher. Longer than 2,000 characters, it is cut.
        """

    @abstractmethod
    def canonical(self, problem: Problem) -> str:
        """Returns the shortest text that states the gold answer as a completion should. It has to be graded right."""

    def gold_key(self, problem: Problem) -> Hashable:
        """Returns what of a problem its verdicts depend on, by default all of it; one key is checked once."""
        return problem

    def warm_up(self, kinds: Collection[str]) -> None:  # noqa: B027  most verifiers have nothing heavy to import
        """Imports what grading problems of these kinds needs. It is called once, before the pool's workers are forked.

        Args:
            kinds: kinds of the problems that will be graded
        """


class ErrorLocator(ABC):
    """An error locator finds the first error of a wrong rollout."""

    @abstractmethod
    def locate(self, problem: Problem, text: str) -> Span | None:
        """Returns the characters [start, end) of the first error in `text`; None where none is found."""


@dataclass(frozen=True)
class Mistake:
    """A mistake is the first error of an attempt.

    Args:
        span: characters [start, end) of the error
        quote: step or answer that holds the error
        idea: what to do instead
    """

    span: Span
    quote: str
    idea: str


class MistakeLocator(ErrorLocator):
    """A mistake locator knows a task so well that it also says what to do instead."""

    @abstractmethod
    def mistake(self, problem: Problem, text: str) -> Mistake | None:
        """Returns the first mistake of an attempt; None where none is found."""

    @abstractmethod
    def idea(self, problem: Problem) -> str:
        """Returns what to keep in mind from the first step on."""

    def locate(self, problem: Problem, text: str) -> Span | None:
        found = self.mistake(problem, text)
        return None if found is None else found.span


def num_alike(one: str, other: str) -> int:
    """Returns the number of characters with which two texts begin alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def drawn(source: ProblemSource, count: int, draw: int, seed: int) -> list[Problem]:
    """Returns `count` problems of an endless sequence of shuffled passes over the source.

    Draw number `draw`, from 0, has the problems at places draw * count to draw * count + count - 1.
    """
    size, first = len(source), draw * count
    orders: dict[int, list[int]] = {}
    for lap in range(first // size, (first + count - 1) // size + 1):
        orders[lap] = random.Random(derive(seed, "order", lap)).sample(range(size), size)
    return [source[orders[p // size][p % size]] for p in range(first, first + count)]
