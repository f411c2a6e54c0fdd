"""Multiple choice in natural language, with the option in words before its letter, and exact places of errors.

    <reasoning>
    1.39 x 10^(-3) Tesla
    </reasoning>
    <answer>
    C
    </answer>

The data have no reference solutions. What stands for one here is the right option, so what a teacher can read is the
answer and no way to it. The idea of a wrong attempt says that it is not that option.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import ClassVar

from lab.demonstrations import NothingPlanted, Work, WorkedAttempts, first_difference

from ogls.records import Problem
from ogls.tasks.base import Mistake, MistakeLocator
from ogls.tasks.tables import JsonlProblems

_OPTION = re.compile(r"^([A-D]): *(.+?)\s*(?=^[A-D]: |^Please reason|\Z)", re.MULTILINE | re.DOTALL)
_CHOSEN = re.compile(r"<reasoning>\n(.+?)\n</reasoning>", re.DOTALL)


@dataclass(frozen=True)
class Choice:
    """A choice is what a problem asks for.

    Args:
        options: text of each option by its letter
        answer: letter of the right one
    """

    options: dict[str, str]
    answer: str

    @classmethod
    def read(cls, problem: Problem) -> Choice:
        """Returns the choice of a problem. Raises ValueError where the right letter has no option."""
        options: dict[str, str] = dict(_OPTION.findall(problem.text))
        if problem.answer not in options:
            raise ValueError(f"expected an option {problem.answer}, such as 'A: 1.5 m', got {problem.text!r}")
        return cls(options, problem.answer)

    def stated(self, letter: str) -> str:
        """Returns an attempt that chooses the option."""
        return f"<reasoning>\n{self.options[letter]}\n</reasoning>\n<answer>\n{letter}\n</answer>"

    @property
    def idea(self) -> str:
        """Returns what to keep in mind where no attempt was wrong."""
        return "Compare the options."

    def work(self, rng: random.Random | None = None, slip: float = 0.0, wrong_idea: bool = False, /) -> str:
        """Returns the right attempt."""
        return self.stated(self.answer)

    def wrong_work(self, rng: random.Random, slip: float = 0.2, /) -> str:
        """Returns an attempt that chooses another option."""
        return self.stated(rng.choice([letter for letter in self.options if letter != self.answer]))


@dataclass(frozen=True)
class Choices(JsonlProblems):
    """This source reads multiple choice, with the right option as the solution and without a system message.

    A problem whose right letter has no option keeps its solution, if there is one.
    """

    def __getitem__(self, index: int) -> Problem:
        problem = replace(super().__getitem__(index), system=None)
        try:
            return replace(problem, solution=Choice.read(problem).work())
        except ValueError:
            return problem


@dataclass(frozen=True)
class ChoiceErrors(MistakeLocator):
    """This locator finds where the words of a chosen option leave those of the right one."""

    def idea(self, problem: Problem) -> str:
        return Choice.read(problem).idea

    def mistake(self, problem: Problem, text: str) -> Mistake | None:
        chosen, right = _CHOSEN.search(text), _CHOSEN.search(problem.solution or "")
        if chosen is None or right is None or chosen[1] == right[1]:
            return None
        begin, end = first_difference(chosen[1], right[1])
        return Mistake((chosen.start(1) + begin, chosen.start(1) + end), chosen[1], f"It is not {chosen[1]}")


@dataclass(frozen=True)
class ChoiceHabits(NothingPlanted):
    """Choice habits are what the cold start shows: the format, and that an attempt in view is mostly followed."""

    mistakes: ClassVar[MistakeLocator] = ChoiceErrors()

    def read(self, problem: Problem) -> Work:
        return Choice.read(problem)


@dataclass(frozen=True)
class StatedChoices(WorkedAttempts):
    """StatedChoices shows one demonstration per problem of `Choices`, for a cold start by likelihood.

    Args:
        habits: what is shown
    """

    habits: ChoiceHabits = ChoiceHabits()
