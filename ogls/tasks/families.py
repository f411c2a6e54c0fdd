"""Families of word problems each have an idea of their own, and a mistake of their own that misses it.

This is a problem of the family ``pages``, its solution, and its mistake:

    How many pages are 12 to 19?      19-12=7           19-12=7
                                      7+1=8             \\boxed{7}
                                      \\boxed{8}

The idea, ``Count the first page, too.``, can be read off the mistake. It helps with no problem of another family, whose
idea is another one. Besides, any line can have a slip, which asks for care.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Literal

from ogls.records import Problem
from ogls.system.seeds import derive
from ogls.tasks.base import Mistake, MistakeLocator, ProblemSource

CARE = "Calculate with care."
"""This idea is for a slip, which is every first mistake but the one of the family."""

_SLIPS = (-10, -3, -2, -1, 1, 2, 3, 10)
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
    "% of ": lambda a, b: a * b // 100,
}


class _Unfit(Exception):
    """A slip led to a number below zero or a division by zero."""


@dataclass
class Sheet:
    """A sheet is where a calculation is written down, line by line.

    Args:
        rng: source of random slips
        slip: probability that the result of a line is wrong, with which the later lines go on
        lines: lines so far
    """

    rng: random.Random | None = None
    slip: float = 0.0
    lines: list[str] = field(default_factory=list)

    def do(self, left: int, op: str, right: int) -> int:
        """Returns the result of an operation, slips included, after writing its line."""
        if op == "/" and right == 0:
            raise _Unfit
        result = _OPERATIONS[op](left, right)
        if self.rng is not None and self.rng.random() < self.slip:
            result += self.rng.choice(_SLIPS)
        if result < 0:
            raise _Unfit
        rest = left - _OPERATIONS["/"](left, right) * right if op == "/" else 0
        self.lines.append(f"{left}{op}{right}={result}" + (f" rest {rest}" if rest else ""))
        return result


Split = Literal["train", "heldout"]

Rule = Callable[..., int | str]
"""A rule calculates an answer on a sheet, from the numbers of a problem."""


@dataclass(frozen=True)
class Family:
    """A family is a kind of problem with its idea.

    Args:
        text: text of its problems, with a place ``{}`` for every number
        idea: what to keep in mind
        numbers: values that each number can take
        right: rule that solves its problems
        wrong: rule that misses the idea
        fits: whether some numbers make a problem
    """

    text: str
    idea: str
    numbers: tuple[Sequence[int], ...]
    right: Rule
    wrong: Rule
    fits: Callable[..., bool] = lambda *_: True

    def parse(self, text: str) -> tuple[int, ...] | None:
        """Returns the numbers of a problem in a text; None where it has none of this family."""
        found = re.search(re.escape(self.text).replace(r"\{\}", r"(?<!\d)(\d+)(?!\d)"), text)
        return None if found is None else tuple(map(int, found.groups()))

    def tasks(self, split: Split) -> list[Task]:
        """Returns all problems of one part in which the wrong rule gives a wrong answer."""
        tasks = [Task(self, numbers) for numbers in product(*self.numbers) if self.fits(*numbers)]
        tasks = [task for task in tasks if task.answer != task.missed]
        return [task for task in tasks if (derive("family", str(task)) % 5 == 0) == (split == "heldout")]


def _carry(sheet: Sheet, a: int, b: int) -> str:
    ones = sheet.do(a % 10, "+", b % 10)
    return f"{sheet.do(sheet.do(a // 10, '+', b // 10), '+', 1)}{ones % 10}"


def _no_carry(sheet: Sheet, a: int, b: int) -> str:
    ones = sheet.do(a % 10, "+", b % 10)
    return f"{sheet.do(a // 10, '+', b // 10)}{ones % 10}"


def _mean(s: Sheet, n: int, a: int, m: int, b: int) -> int:
    return s.do(s.do(s.do(n, "*", a), "+", s.do(m, "*", b)), "/", n + m)


FAMILIES: dict[str, Family] = {
    "order": Family(
        text="What is {}+{}*{}?",
        idea="Multiply first.",
        numbers=(range(2, 21), range(2, 6), range(2, 6)),
        right=lambda s, a, b, c: s.do(a, "+", s.do(b, "*", c)),
        wrong=lambda s, a, b, c: s.do(s.do(a, "+", b), "*", c),
    ),
    "sign": Family(
        text="What is {}-({}-{})?",
        idea="The minus turns the sign.",
        numbers=(range(20, 31), range(8, 20), range(2, 8)),
        right=lambda s, a, b, c: s.do(s.do(a, "-", b), "+", c),
        wrong=lambda s, a, b, c: s.do(s.do(a, "-", b), "-", c),
        fits=lambda a, b, c: a >= b + c,
    ),
    "square": Family(
        text="What is ({}+{})^2?",
        idea="Square the sum.",
        numbers=(range(1, 13), range(1, 13)),
        right=lambda s, a, b: s.do(c := s.do(a, "+", b), "*", c),
        wrong=lambda s, a, b: s.do(s.do(a, "*", a), "+", s.do(b, "*", b)),
        fits=lambda a, b: a + b <= 14,
    ),
    "carry": Family(
        text="Add in columns: {} and {}.",
        idea="Carry the ten.",
        numbers=(range(11, 40), range(11, 40)),
        right=_carry,
        wrong=_no_carry,
        fits=lambda a, b: a % 10 + b % 10 >= 10,
    ),
    "units": Family(
        text="How many minutes are {} h {} min?",
        idea="An hour has 60 minutes.",
        numbers=(range(1, 6), range(1, 40)),
        right=lambda s, a, b: s.do(s.do(a, "*", 60), "+", b),
        wrong=lambda s, a, b: s.do(s.do(a, "*", 100), "+", b),
    ),
    "pages": Family(
        text="How many pages are {} to {}?",
        idea="Count the first page, too.",
        numbers=(range(2, 20), range(5, 30)),
        right=lambda s, a, b: s.do(s.do(b, "-", a), "+", 1),
        wrong=lambda s, a, b: s.do(b, "-", a),
        fits=lambda a, b: b >= a + 3,
    ),
    "cuts": Family(
        text="How many cuts make {} m into pieces of {} m?",
        idea="The last piece needs no cut.",
        numbers=(range(6, 91), range(2, 11)),
        right=lambda s, a, b: s.do(s.do(a, "/", b), "-", 1),
        wrong=lambda s, a, b: s.do(a, "/", b),
        fits=lambda a, b: a % b == 0 and 3 <= a // b <= 14,
    ),
    "percent": Family(
        text="Of {} pupils {}% are girls, and {}% of the girls sing. How many?",
        idea="The percent are of the girls.",
        numbers=(range(100, 1000, 100), range(10, 60, 10), range(10, 60, 10)),
        right=lambda s, a, b, c: s.do(c, "% of ", s.do(b, "% of ", a)),
        wrong=lambda s, a, b, c: s.do(c, "% of ", a),
    ),
    "cars": Family(
        text="How many cars do {} guests need, {} in each?",
        idea="The rest needs a car, too.",
        numbers=(range(7, 36), range(3, 7)),
        right=lambda s, a, b: s.do(s.do(a, "/", b), "+", 1),
        wrong=lambda s, a, b: s.do(a, "/", b),
        fits=lambda a, b: a % b > 0,
    ),
    "modulo": Family(
        text="What is -{} mod {}?",
        idea="Go up from below zero.",
        numbers=(range(5, 41), range(3, 7)),
        right=lambda s, a, b: s.do(s.do(b, "*", (a + b - 1) // b), "-", a),
        wrong=lambda s, a, b: s.do(a, "-", s.do(b, "*", a // b)),
        fits=lambda a, b: a > b and a % b > 0,
    ),
    "fraction": Family(
        text="What is 1/{}+1/{}?",
        idea="Take a common denominator.",
        numbers=(range(2, 12), range(2, 12)),
        right=lambda s, a, b: f"{s.do(a, '+', b)}/{s.do(a, '*', b)}",
        wrong=lambda s, a, b: f"{s.do(1, '+', 1)}/{s.do(a, '+', b)}",
        fits=lambda a, b: a != b,
    ),
    "average": Family(
        text="{} of us have {} points each, {} have {}. What is the average?",
        idea="Weigh the groups.",
        numbers=(range(1, 5), range(2, 13), range(1, 5), range(2, 13)),
        right=_mean,
        wrong=lambda s, n, a, m, b: s.do(s.do(a, "+", b), "/", 2),
        fits=lambda n, a, m, b: n != m and a != b and (a + b) % 2 == 0 and (n * a + m * b) % (n + m) == 0,
    ),
    "fence": Family(
        text="How long is a fence around {} m by {} m?",
        idea="A fence goes around, not over.",
        numbers=(range(2, 21), range(2, 7)),
        right=lambda s, a, b: s.do(s.do(a, "+", b), "*", 2),
        wrong=lambda s, a, b: s.do(a, "*", b),
    ),
    "clock": Family(
        text="It is {} o'clock. What is it after {} hours?",
        idea="A day has 24 hours.",
        numbers=(range(1, 24), range(2, 24)),
        right=lambda s, a, b: s.do(s.do(a, "+", b), "-", 24),
        wrong=lambda s, a, b: s.do(a, "+", b),
        fits=lambda a, b: a + b >= 24,
    ),
    "undo": Family(
        text="{} is {} more than a number. Which?",
        idea="Undo what was done.",
        numbers=(range(20, 60), range(2, 20)),
        right=lambda s, a, b: s.do(a, "-", b),
        wrong=lambda s, a, b: s.do(a, "+", b),
    ),
}
"""All families by name."""


@dataclass(frozen=True)
class Task:
    """A task is a family with numbers: what its problem asks.

    Args:
        family: family of the problem
        numbers: numbers in the order of the text
    """

    family: Family
    numbers: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Task:
        """Returns the task that a text asks. Raises ValueError where there is none."""
        for family in FAMILIES.values():
            numbers = family.parse(text)
            if numbers is not None:
                return cls(family, numbers)
        raise ValueError(f"expected a problem of the families {', '.join(FAMILIES)}, got: {text!r}")

    def __str__(self) -> str:
        return self.family.text.format(*self.numbers)

    def lines(self, wrong_idea: bool = False, rng: random.Random | None = None, slip: float = 0.0) -> list[str]:
        """Returns the lines of a calculation, whose last one is the answer in a box.

        Args:
            wrong_idea: whether it goes by the wrong rule
            rng: source of random slips; None makes none
            slip: probability that a line has a slip
        """
        while True:
            sheet = Sheet(rng, slip)
            try:
                answer = (self.family.wrong if wrong_idea else self.family.right)(sheet, *self.numbers)
            except _Unfit:
                continue
            return [*sheet.lines, f"\\boxed{{{answer}}}"]

    @property
    def answer(self) -> str:
        """Returns the right answer."""
        return str(self.family.right(Sheet(), *self.numbers))

    @property
    def missed(self) -> str:
        """Returns the answer of the wrong rule."""
        return str(self.family.wrong(Sheet(), *self.numbers))

    @property
    def idea(self) -> str:
        """Returns the idea of the family."""
        return self.family.idea

    def work(self, rng: random.Random | None = None, slip: float = 0.0, wrong_idea: bool = False) -> str:
        """Returns the text of `lines` with the same arguments; without arguments it is the right solution."""
        return "\n".join(self.lines(wrong_idea, rng, slip))

    def wrong_work(self, rng: random.Random, slip: float = 0.2, wrong_idea: float = 0.7) -> str:
        """Returns a worked attempt that ends in a wrong answer.

        Args:
            rng: source of random errors
            slip: probability that a line has a slip
            wrong_idea: probability of the wrong rule
        """
        while True:
            lines = self.lines(rng.random() < wrong_idea, rng, slip)
            if lines[-1] != self.lines()[-1]:
                return "\n".join(lines)


@dataclass(frozen=True)
class Families(ProblemSource):
    """This source has `size` different problems, as many of each family; the same arguments give the same problems.

    Args:
        size: number of problems
        split: part of all problems to take from: ``train``, or ``heldout``, a fifth of them. The two parts share no
            problem, since the hash of a problem decides where it belongs.
        families: names of the families; an empty list takes all
        seed: seed of the choice of problems

    Raises:
        ValueError: a family is unknown or named twice, or has too few problems.
    """

    size: int
    split: Split = "train"
    families: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted({*self.families} - FAMILIES.keys())
        if unknown or len({*self.families}) < len(self.families):
            raise ValueError(f"expected different ones of the families {', '.join(FAMILIES)}, got {self.families}")
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        _ = self.tasks  # which says whether there are enough

    @cached_property
    def tasks(self) -> list[Task]:
        """Returns the tasks of all problems; families take turns."""
        names = list(self.families) or list(FAMILIES)
        each, drawn = -(-self.size // len(names)), []
        for name in names:
            own = FAMILIES[name].tasks(self.split)
            if len(own) < each:
                raise ValueError(
                    f"the family {name} has {len(own)} problems in {self.split}, got a size of {each} each"
                )
            drawn.append(random.Random(derive(self.seed, "families", self.split, name)).sample(own, each))
        return [task for turn in zip(*drawn, strict=True) for task in turn][: self.size]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        task = self.tasks[index]
        return Problem(id=f"family-{task}", text=str(task), answer=task.answer, solution=task.work())


@dataclass(frozen=True)
class FamilyErrors(MistakeLocator):
    """This locator solves a problem of `Families` by both rules, and finds the first line that is not the right one."""

    def idea(self, problem: Problem) -> str:
        return Task.parse(problem.text).idea

    def mistake(self, problem: Problem, text: str) -> Mistake | None:
        task, start = Task.parse(problem.text), 0
        right, wrong = task.lines(), task.lines(wrong_idea=True)
        for number, written in enumerate(text.splitlines(keepends=True)[: len(right)]):
            line = written.rstrip("\n")
            if line == right[-1]:
                return None
            if line != right[number]:
                missed = number < len(wrong) and right[number] != wrong[number] and _left(line) == _left(wrong[number])
                missed = missed and (_left(line) != _left(right[number]) or line == wrong[number])
                same = next((i for i, (a, b) in enumerate(zip(line, right[number], strict=False)) if a != b), 0)
                span = (start + same, start + max(len(line), same + 1))
                return Mistake(span, line, task.idea if missed or line == f"\\boxed{{{task.missed}}}" else CARE)
            start += len(written)
        return None


def _left(line: str) -> str:
    return re.split(r"[={]", line, maxsplit=1)[0]
