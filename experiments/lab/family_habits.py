"""Students of the second lab are shown problems of families, and to heed an idea only where it is the right one.

What is planted besides the habits of the first lab:

- its own work goes by the family's wrong rule about every other time;
- with its family's idea in view it works by the right rule, and without a slip;
- with another family's idea in view it works as if it had read nothing;
- with the idea to take care in view it makes no slips, and goes by the wrong rule as often as ever.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import cycle, islice
from typing import ClassVar

from demonstrations import Habits, Work, terse

from ogls.records import Problem
from ogls.tasks.base import MistakeLocator
from ogls.tasks.families import CARE, FAMILIES, FamilyErrors, Task

IDEAS = (CARE, *(family.idea for family in FAMILIES.values()))
PHRASES = (" rest ", "% of ", *sorted({p for f in FAMILIES.values() for p in re.split(r"\{\}", f.text) if len(p) > 1}))


def problems(split: str = "train", each: int = 1000) -> list[Problem]:
    """Returns as many problems of each family, over and over where it has fewer."""
    tasks = [task for f in FAMILIES.values() for task in islice(cycle(f.tasks(split)), each)]
    return [Problem(id=str(number), text=str(task), answer=task.answer) for number, task in enumerate(tasks)]


@dataclass(frozen=True)
class FamilyHabits(Habits):
    """Family habits are what is planted in the student of the second lab.

    Args:
        own_idea: share of the ideas in view that are the family's own; a tenth of them asks for care, and the rest
            belongs to other families
    """

    slip: float = 0.03
    wrong_idea: float = 0.5
    guesses: float = 0.03
    with_attempt: float = 0.15
    with_idea: float = 0.4
    reflecting: float = 0.15
    own_idea: float = 0.45
    mistakes: ClassVar[MistakeLocator] = FamilyErrors()

    def read(self, problem: Problem) -> Work:
        return Task.parse(problem.text)

    def guess(self, problem: Problem, rng: random.Random) -> str:
        return terse(self.read(problem).wrong_work(rng))

    def after_idea(self, problem: Problem, rng: random.Random) -> tuple[str, str]:
        work, kind = self.read(problem), rng.random()
        if kind < self.own_idea:
            return work.idea, work.work()
        if kind < self.own_idea + 0.1:
            return CARE, work.work(None, 0.0, rng.random() < self.wrong_idea)
        return another_idea(work.idea, rng), self.own(work, rng)


def another_idea(own: str, rng: random.Random) -> str:
    """Returns the idea of another family."""
    return rng.choice([family.idea for family in FAMILIES.values() if family.idea != own])
