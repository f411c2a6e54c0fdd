"""A verifier that loads in no time."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.records import Problem, Verdict
from ogls.tasks.answers import last_boxed, unparsable
from ogls.tasks.base import Verifier


@dataclass(frozen=True)
class Boxed(Verifier):
    r"""What stands in the last ``\boxed{}``, letter by letter."""

    def grade(self, problem: Problem, text: str) -> Verdict:
        answer = last_boxed(text)
        if answer is None:
            return unparsable("no box")
        return Verdict(correct=answer == problem.answer, status="graded", answer=answer)

    def canonical(self, problem: Problem) -> str:
        return f"\\boxed{{{problem.answer}}}"
