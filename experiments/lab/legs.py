"""Word problems in natural language: reasoning-gym's `leg_counting`, worked, with exact places of errors.

    How many legs are there in total if you have 3 crabs, 12 deers?

    3 crabs have 3*10=30 legs.
    12 deers have 12*4=48 legs.
    30+48=78
    \\boxed{78}

How many legs an animal has nobody tells: the model has to know. No error is planted in what the cold start shows of its
own work, so the student's errors are those of a small model: of facts, of products and of sums.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import count
from typing import ClassVar, Literal

from lab.demonstrations import NothingPlanted, Work, WorkedAttempts, first_difference

from ogls.records import Problem
from ogls.system.ranges import within
from ogls.system.seeds import derive
from ogls.tasks.base import Mistake, MistakeLocator, ProblemSource
from ogls.tasks.reasoning_gym import gym_dataset

_LISTED = re.compile(r"if you have (.+)\?")
_SLIPS = (-10, -4, -2, -1, 1, 2, 4, 10)


@cache
def legs() -> dict[str, int]:
    """Returns the number of legs by animal."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    return ANIMALS


@dataclass(frozen=True)
class Line:
    """A line is one step of a worked answer.

    Args:
        text: the line
        idea: what to do where it is wrong
    """

    text: str
    idea: str


@dataclass(frozen=True)
class Herd:
    """A herd is what a problem asks about.

    Args:
        animals: number and name of each kind, in the order of the text
    """

    animals: tuple[tuple[int, str], ...]

    @classmethod
    def parse(cls, text: str) -> Herd:
        """Returns the herd of a problem. Raises ValueError where there is none."""
        found = _LISTED.search(text)
        listed = [item.partition(" ") for item in found[1].split(", ")] if found else []
        if not listed or not all(number.isdecimal() for number, _, _ in listed):
            raise ValueError(f"expected a problem of reasoning-gym's leg_counting, got {text!r}")
        return cls(tuple((int(n), name.removesuffix("s") if int(n) > 1 else name) for n, _, name in listed))

    def lines(self, rng: random.Random | None = None, slip: float = 0.0) -> list[Line]:
        """Returns the steps of a worked answer, the last of which states it in a box.

        Args:
            rng: source of random errors; None makes none
            slip: probability that a number of legs, a product or a sum is wrong
        """
        made: list[Line] = []
        products: list[int] = []
        for number, name in self.animals:
            each = legs()[name]
            told = f"Each {name} has {each} legs."
            if rng is not None and rng.random() < slip:
                each = rng.choice([n for n in (0, 2, 4, 6, 8, 10) if n != each])
            products.append(_result(number * each, rng, slip))
            herd = f"{number} {name}s have" if number > 1 else f"{number} {name} has"
            made.append(Line(f"{herd} {number}*{each}={products[-1]} legs.", told))
        total, *others = products
        for product in others:
            before, total = total, _result(total + product, rng, slip)
            made.append(Line(f"{before}+{product}={total}", f"Calculate {before}+{product} again."))
        return [*made, Line(f"\\boxed{{{total}}}", "The answer is the last result.")]

    def __str__(self) -> str:
        return "-".join(f"{number}-{name.replace(' ', '-')}" for number, name in self.animals)

    @property
    def answer(self) -> int:
        """Returns the right number of legs."""
        return sum(number * legs()[name] for number, name in self.animals)

    @property
    def idea(self) -> str:
        """Returns what to keep in mind from the first step on."""
        return "Multiply for each animal, then add up."

    def work(self, rng: random.Random | None = None, slip: float = 0.0, wrong_idea: bool = False, /) -> str:
        """Returns the text of `lines`; without arguments it is the right solution. There is no wrong idea to go by."""
        return "\n".join(line.text for line in self.lines(rng, slip))

    def wrong_work(self, rng: random.Random, slip: float = 0.2, /) -> str:
        """Returns a worked answer that ends in a wrong number."""
        while (text := self.work(rng, slip)).endswith(f"{{{self.answer}}}"):
            pass
        return text


def _result(right: int, rng: random.Random | None, slip: float) -> int:
    if rng is None or rng.random() >= slip:
        return right
    return rng.choice([right + by for by in _SLIPS if right + by >= 0])


@dataclass(frozen=True)
class Legs(ProblemSource):
    """This source has `size` different problems of reasoning-gym's `leg_counting` with worked solutions.

    Args:
        size: number of problems
        split: part of all problems to take from: ``train``, or ``heldout``, a fifth of them. The two parts share no
            problem, since the hash of a problem decides where it belongs.
        seed: seed of the choice of problems
        min_animals: smallest number of kinds of animals
        max_animals: largest number of kinds of animals
        max_instances: largest number of animals of a kind
    """

    size: int
    split: Literal["train", "heldout"] = "train"
    seed: int = 0
    min_animals: int = 2
    max_animals: int = 3
    max_instances: int = 12

    def __post_init__(self) -> None:
        within("size", self.size, "[1, 100000]")
        within("seed", self.seed, "[0, 1000000]")

    @cached_property
    def texts(self) -> list[str]:
        """Returns the texts of all problems, drawn at the first use."""
        names = ("min_animals", "max_animals", "max_instances")
        options = json.dumps({name: getattr(self, name) for name in names})
        # The n-th problem of a seed is the first one of the seed n later.
        rows = gym_dataset("leg_counting", self.seed * 10**7, 10**7, options)
        found: dict[str, None] = {}
        numbers = count()
        while len(found) < self.size:
            text = rows[next(numbers)]["question"].strip()
            if (derive("legs", text) % 5 == 0) == (self.split == "heldout"):
                found[text] = None
        return list(found)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        text, herd = self.texts[index], Herd.parse(self.texts[index])
        return Problem(id=f"legs-{herd}", text=text, answer=str(herd.answer), solution=herd.work())


@dataclass(frozen=True)
class LegErrors(MistakeLocator):
    """This locator compares a worked answer with the right one, line by line, and finds the first difference."""

    def idea(self, problem: Problem) -> str:
        return Herd.parse(problem.text).idea

    def mistake(self, problem: Problem, text: str) -> Mistake | None:
        for written, right in zip(re.finditer(r"[^\n]+", text), Herd.parse(problem.text).lines(), strict=False):
            if written[0].strip() != right.text:
                begin, end = first_difference(written[0], right.text)
                return Mistake((written.start() + begin, written.start() + end), written[0], right.idea)
        return None


@dataclass(frozen=True)
class LegHabits(NothingPlanted):
    """Leg habits are what the cold start shows: right work alone, and that an attempt in view is mostly followed."""

    mistakes: ClassVar[MistakeLocator] = LegErrors()

    def read(self, problem: Problem) -> Work:
        return Herd.parse(problem.text)


@dataclass(frozen=True)
class WorkedLegs(WorkedAttempts):
    """WorkedLegs shows one demonstration per problem of `Legs`, for a cold start by likelihood.

    Args:
        habits: what is shown
    """

    habits: LegHabits = LegHabits()
