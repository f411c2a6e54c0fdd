"""Chains of additions and subtractions are problems whose steps can be checked.

This is a problem and its solution:

    What is 20-(9-4)+7?      9-4=5
                             20-5=15
                             15+7=22
                             \\boxed{22}

Two things can go wrong in a chain: a slip in any step, and a wrong idea, which is to calculate from left to right as if
there were no parentheses. The small model that comes with the project cannot solve chains at first. A cold start
teaches it this format, both kinds of error, and how to use what it reads. From then on, methods can be compared on a
laptop.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from ogls.records import Problem, Span
from ogls.system.seeds import derive
from ogls.tasks.base import Mistake, MistakeLocator, ProblemSource, num_alike

_CHAIN = re.compile(r"(?:\(|(?<!\d))\d++(?:[+-]\(?\d++\)?)+")
_STEP = re.compile(r"(?<!\d)(\d++)([+-])(\d++)=(\d+)")
_SLIPS = (-10, -3, -2, -1, 1, 2, 3, 10)

Step = tuple[int, str, int, int]
"""A step is (left, operation, right, result), such as ``(9, "-", 4, 5)``."""


@dataclass(frozen=True)
class Chain:
    """A chain is an arithmetic expression, ``start op number op number ...``, with at most one pair of parentheses.

    An opening parenthesis always follows a minus, so that it changes the result.

    Args:
        start: first number
        terms: operation and number of every further place; places count from 1
        inner: place of the first of two numbers in parentheses; None where there are no parentheses
    """

    start: int
    terms: tuple[tuple[str, int], ...]
    inner: int | None = None

    @classmethod
    def parse(cls, text: str) -> Chain:
        """Returns the first chain in a text. Raises ValueError where there is none."""
        found = _CHAIN.search(text)
        flat = found and re.fullmatch(r"(\d+)((?:[+-]\d+)+)", re.sub(r"[()]", "", found[0]))
        if not found or not flat:
            raise ValueError(f"expected a chain such as 20-(9-4)+7, got: {text!r}")
        terms = tuple((op, int(number)) for op, number in re.findall(r"([+-])(\d+)", flat[2]))
        before, opened, _ = found[0].partition("(")
        chain = cls(int(flat[1]), terms, len(re.findall(r"\d+", before)) if opened else None)
        if str(chain) != found[0]:
            raise ValueError(f"expected a chain such as 20-(9-4)+7, got: {text!r}")
        return chain

    def __str__(self) -> str:
        text = str(self.start)
        for place, (op, number) in enumerate(self.terms, start=1):
            opened = "(" if place == self.inner else ""
            closed = ")" if self.inner is not None and place == self.inner + 1 else ""
            text += f"{op}{opened}{number}{closed}"
        return text

    def steps(self, rng: random.Random | None = None, slip: float = 0.0, left_to_right: bool = False) -> list[Step]:
        """Returns the steps of a calculation.

        Args:
            rng: source of random slips; None makes none
            slip: probability that the result of a step is wrong, with which the later steps go on
            left_to_right: whether parentheses are ignored, which is the wrong idea
        """
        steps: list[Step] = []
        terms = list(self.terms)
        if self.inner is not None and not left_to_right:
            at = self.inner - 1
            steps.append(_calculate(terms[at][1], *terms[at + 1], rng, slip))
            terms[at : at + 2] = [(terms[at][0], steps[-1][3])]
        value = self.start
        for op, number in terms:
            steps.append(_calculate(value, op, number, rng, slip))
            value = steps[-1][3]
        return steps

    @property
    def answer(self) -> int:
        """Returns the right result."""
        return self.steps()[-1][3]

    @property
    def idea(self) -> str:
        """Returns what to keep in mind from the first step on."""
        return "Calculate from left to right." if self.inner is None else PARENTHESES_FIRST

    @property
    def never_negative(self) -> bool:
        """Returns whether every intermediate value is at least 0, in the right order and from left to right."""
        return all(step[3] >= 0 for order in (False, True) for step in self.steps(left_to_right=order))

    def work(self, rng: random.Random | None = None, slip: float = 0.0, left_to_right: bool = False) -> str:
        """Returns the text of `steps` with the same arguments; without arguments it is the right solution."""
        return write(self.steps(rng, slip, left_to_right))

    def wrong_work(self, rng: random.Random, slip: float = 0.4, wrong_idea: float = 0.5) -> str:
        """Returns a worked attempt that ends in a wrong answer.

        Args:
            rng: source of random errors
            slip: probability that the result of a step is wrong
            wrong_idea: probability that parentheses are ignored, in a chain that has some
        """
        while True:
            steps = self.steps(rng, slip, self.inner is not None and rng.random() < wrong_idea)
            if steps[-1][3] != self.answer and min(step[3] for step in steps) >= 0:
                return write(steps)


def _calculate(left: int, op: str, right: int, rng: random.Random | None, slip: float) -> Step:
    result = left + right if op == "+" else left - right
    if rng is not None and rng.random() < slip:
        result = rng.choice([result + by for by in _SLIPS if result + by >= 0] or [result])
    return left, op, right, result


def write(steps: list[Step]) -> str:
    """Returns the text of steps: one line per step, then the last result in a box."""
    lines = [f"{left}{op}{right}={result}" for left, op, right, result in steps]
    return "\n".join([*lines, f"\\boxed{{{steps[-1][3]}}}"])


@dataclass(frozen=True)
class Chains(ProblemSource):
    """This source has `size` different chains; the same arguments give the same chains.

    Args:
        size: number of problems
        split: part of all chains to take from: ``train``, or ``heldout``, a fifth of them. The two parts share no
            chain, since the hash of a chain decides where it belongs.
        min_steps: smallest number of operations per chain
        max_steps: largest number of operations per chain
        low: smallest number in a chain
        high: largest number in a chain
        parentheses: share of chains with a pair of parentheses; such a chain has at least two steps
        seed: seed of the choice of chains

    Raises:
        ValueError: an argument is out of its range, or there are too few chains of this kind.
    """

    size: int
    split: Literal["train", "heldout"] = "train"
    min_steps: int = 2
    max_steps: int = 3
    low: int = 2
    high: int = 20
    parentheses: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"expected 1 <= min_steps <= max_steps, got {self.min_steps} and {self.max_steps}")
        if not 0 <= self.low < self.high:
            raise ValueError(f"expected 0 <= low < high, got {self.low} and {self.high}")
        if not 0 <= self.parentheses <= 1 or (self.parentheses and self.min_steps < 2):
            raise ValueError(
                f"parentheses is a share between 0 and 1 of chains of two steps or more, got {self.parentheses} "
                f"with min_steps {self.min_steps}"
            )
        possible = (self.high - self.low + 1) ** (self.max_steps + 1)
        if not 0 < self.size <= possible // 10:
            raise ValueError(f"size must be between 1 and {possible // 10} for these numbers, got {self.size}")

    @cached_property
    def chains(self) -> list[Chain]:
        """Returns the chains of all problems, drawn at the first use."""
        rng = random.Random(derive(self.seed, "chains", self.split))
        chains: dict[str, Chain] = {}
        while len(chains) < self.size:
            chain = self._draw(rng, rng.random() < self.parentheses)
            chains.setdefault(str(chain), chain)
        return list(chains.values())

    def _draw(self, rng: random.Random, parentheses: bool) -> Chain:
        while True:
            count = rng.randint(self.min_steps, self.max_steps)
            start, *numbers = [rng.randint(self.low, self.high) for _ in range(count + 1)]
            ops = [rng.choice("+-") for _ in numbers]
            inner = rng.randint(1, count - 1) if parentheses else None
            if inner is not None:
                ops[inner - 1] = "-"
            chain = Chain(start, tuple(zip(ops, numbers, strict=True)), inner)
            heldout = derive("chain", str(chain)) % 5 == 0
            if heldout == (self.split == "heldout") and chain.never_negative:
                return chain

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        chain = self.chains[index]
        return Problem(id=f"chain-{chain}", text=f"What is {chain}?", answer=str(chain.answer), solution=chain.work())


def first_mistake(problem: Problem, text: str) -> Mistake | None:
    """Returns the first number of an attempt that should have been another; None where none is found.

    The chain is recomputed, so this is exact for attempts in the format above.
    """
    chain, position = Chain.parse(problem.text), 0
    right = chain.steps()
    for step in right:
        found = _STEP.search(text, position)
        if not found:
            return None
        for group, expected in enumerate(step, start=1):
            if found[group] != str(expected):
                idea = f"Calculate {step[0]}{step[1]}{step[2]} again." if group == 4 else "Copy the numbers with care."
                if chain.inner is not None and group < 4 and step is right[0]:
                    idea = PARENTHESES_FIRST
                return Mistake(_first_difference(found.start(group), found[group], str(expected)), found[0], idea)
        position = found.end()
    boxed = re.compile(r"\\boxed\{([^{}]*)\}").search(text, position)
    if boxed and boxed[1] != str(chain.answer):
        span = _first_difference(boxed.start(1), boxed[1], str(chain.answer))
        return Mistake(span, boxed[0], "The answer is the last result.")
    return None


PARENTHESES_FIRST = "Start with the parentheses."


@dataclass(frozen=True)
class ChainErrors(MistakeLocator):
    """This locator recomputes a chain and finds the first wrong number of an attempt."""

    def mistake(self, problem: Problem, text: str) -> Mistake | None:
        return first_mistake(problem, text)

    def idea(self, problem: Problem) -> str:
        return Chain.parse(problem.text).idea


def _first_difference(start: int, got: str, expected: str) -> Span:
    same = num_alike(got, expected)
    return start + same, max(start + len(got), start + same + 1)


@dataclass(frozen=True)
class TerseSolutions(ProblemSource):
    """This source keeps only the last line of every solution: the answer without the work.

    Args:
        problems: source of the problems with their whole solutions
    """

    problems: ProblemSource

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        problem = self.problems[index]
        if problem.solution is None:
            raise ValueError(f"problem {problem.id!r} has no solution to cut short")
        return replace(problem, solution=problem.solution.splitlines()[-1])
