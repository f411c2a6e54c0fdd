"""Chains of additions and subtractions: procedural problems whose every step can be recomputed.

    What is 12+8-9?          12+8=20
                             20-9=11
                             \\boxed{11}

The embedded model is no reasoner as it comes; `WorkedAttempts` teaches it this format, a habit of slipping now
and then, and to make use of an attempt that it reads. From there on, methods can be compared on a laptop.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from ogls.privilege import Draft, Hint, Privilege
from ogls.problems import ProblemSource
from ogls.records import Problem, RolloutGroup
from ogls.seeds import derive
from ogls.selection import ErrorLocator, Span

_STEP = re.compile(r"(\d+)([+-])(\d+)=(\d+)")
_SLIPS = (-10, -3, -2, -1, 1, 2, 3, 10)


@dataclass(frozen=True)
class Chain:
    """start op number op number ...; every intermediate value is at least 0."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> Chain:
        found = re.search(r"(\d+)((?:[+-]\d+)+)", text)
        if not found:
            raise ValueError(f"expected a chain such as 12+8-9, got: {text!r}")
        steps = re.findall(r"([+-])(\d+)", found[2])
        return cls(int(found[1]), tuple((op, int(number)) for op, number in steps))

    def __str__(self) -> str:
        return f"{self.start}" + "".join(f"{op}{number}" for op, number in self.steps)

    def work(self, rng: random.Random | None = None, slip: float = 0.0) -> tuple[str, int]:
        """A worked solution and its answer; each step slips with probability `slip` and the next goes on from there."""
        value, lines = self.start, []
        for op, number in self.steps:
            result = value + number if op == "+" else value - number
            if rng is not None and rng.random() < slip:
                result = rng.choice([result + by for by in _SLIPS if result + by >= 0])
            lines.append(f"{value}{op}{number}={result}")
            value = result
        return "\n".join([*lines, f"\\boxed{{{value}}}"]), value

    @property
    def values(self) -> list[int]:
        """The right result of each step."""
        value, values = self.start, []
        for op, number in self.steps:
            value = value + number if op == "+" else value - number
            values.append(value)
        return values

    def wrong_work(self, rng: random.Random, slip: float = 0.4) -> str:
        """A worked attempt that ends in a wrong answer."""
        while True:
            text, value = self.work(rng, slip)
            if value != self.values[-1]:
                return text


@dataclass(frozen=True)
class Chains(ProblemSource):
    """`size` different chains, the same for the same arguments.

    Args:
        size: number of problems.
        split: ``train`` and ``heldout`` never share a chain: its hash decides where it belongs (a fifth is held out).
        min_steps, max_steps: operations in a chain.
        low, high: range of the numbers, both ends included.
        seed: another seed, another selection.
    """

    size: int
    split: Literal["train", "heldout"] = "train"
    min_steps: int = 2
    max_steps: int = 3
    low: int = 2
    high: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"expected 1 <= min_steps <= max_steps, got {self.min_steps} and {self.max_steps}")
        if not 0 <= self.low < self.high:
            raise ValueError(f"expected 0 <= low < high, got {self.low} and {self.high}")
        possible = (self.high - self.low + 1) ** (self.max_steps + 1)
        if not 0 < self.size <= possible // 10:
            raise ValueError(f"size must be between 1 and {possible // 10} for these numbers, got {self.size}")

    @cached_property
    def chains(self) -> list[Chain]:
        rng = random.Random(derive(self.seed, "chains", self.split))
        chains: dict[str, Chain] = {}
        while len(chains) < self.size:
            count = rng.randint(self.min_steps, self.max_steps)
            numbers = [rng.randint(self.low, self.high) for _ in range(count + 1)]
            chain = Chain(numbers[0], tuple((rng.choice("+-"), number) for number in numbers[1:]))
            heldout = derive("chain", str(chain)) % 5 == 0
            if heldout == (self.split == "heldout") and min(chain.values) >= 0:
                chains.setdefault(str(chain), chain)
        return list(chains.values())

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        chain = self.chains[index]
        text, answer = chain.work()
        return Problem(id=f"chain-{chain}", text=f"What is {chain}?", answer=str(answer), solution=text)


@dataclass(frozen=True)
class ChainErrors(ErrorLocator):
    """Recomputes a chain and finds the first number that should have been another. Exact on the format above."""

    def locate(self, problem: Problem, text: str) -> Span | None:
        chain = Chain.parse(problem.text)
        value, position = chain.start, 0
        for (op, number), result in zip(chain.steps, chain.values, strict=True):
            found = _STEP.search(text, position)
            if not found:
                break
            for group, expected in enumerate((str(value), op, str(number), str(result)), start=1):
                if found[group] != expected:
                    return _first_difference(found.start(group), found[group], expected)
            value, position = result, found.end()
        else:
            boxed = re.compile(r"\\boxed\{([^{}]*)\}").search(text, position)
            if boxed and boxed[1] != str(value):
                return _first_difference(boxed.start(1), boxed[1], str(value))
        return None


def _first_difference(start: int, got: str, expected: str) -> Span:
    same = next(
        (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
    )
    return start + same, max(start + len(got), start + same + 1)


@dataclass(frozen=True)
class WorkedAttempts(Privilege):
    """Demonstrations for the cold start: likelihood on worked solutions, with and without an attempt to read.

    Args:
        with_attempt: share of demonstrations that read an attempt, right or wrong with equal odds, and follow it.
        own_way: share of those that do not follow what they read and work on their own.
        slip: probability that a step of one's own work is wrong.
    """

    with_attempt: float = 0.5
    own_way: float = 0.1
    slip: float = 0.1
    samples_rollouts: ClassVar[bool] = False

    def drafts(self, group: RolloutGroup) -> Iterator[Draft]:
        rng = random.Random(derive("attempt", group.problem.id, group.policy_version))
        chain = Chain.parse(group.problem.text)
        own = chain.work(rng, self.slip)[0]
        if rng.random() >= self.with_attempt:
            yield Draft(demonstration=own)
            return
        read = chain.work()[0] if rng.random() < 0.5 else chain.wrong_work(rng)
        followed = own if rng.random() < self.own_way else read
        yield Draft(demonstration=followed, prompt=Hint(role="success", text=read))
