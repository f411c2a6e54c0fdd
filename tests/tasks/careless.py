"""Verifiers with faults; in a module of their own, so that grading processes need not import what its tests do."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ogls.records import Problem, Verdict
from ogls.tasks.base import Verifier


@dataclass(frozen=True)
class Careless(Verifier):
    """A text is right if it is the gold answer, one of `also`, or the same in the first `digits` characters."""

    also: tuple[str, ...] = ()
    digits: int = 99

    def grade(self, problem: Problem, text: str) -> Verdict:
        same = text[: self.digits] == problem.answer[: self.digits]
        return Verdict(correct=same or text in self.also, status="graded", answer=text)

    def canonical(self, problem: Problem) -> str:
        return problem.answer


@dataclass(frozen=True)
class Sleepy(Careless):
    """Whatever is neither a number nor tried before training takes it for ever."""

    def grade(self, problem: Problem, text: str) -> Verdict:
        if not text.isdecimal() and text not in ("", "xyzzy", "nan"):
            time.sleep(600)
        return super().grade(problem, text)
