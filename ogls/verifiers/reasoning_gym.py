"""Procedural problems of the reasoning-gym package, scored by their own data set."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ogls.problems.reasoning_gym import EntryId, gym_dataset, load_package
from ogls.records import Problem, Verdict
from ogls.verifiers.base import Verifier
from ogls.verifiers.extract import UNPARSABLE, acceptable, last_boxed, last_tagged

# These data sets hand the answer to Python's evaluation in some way.
_EVALUATING = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
# No underscore, brace, colon or attribute, and no call but of these functions: only expressions and lists.
_FUNCTION = r"(?:sin|cos|tan|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt)"
_INERT = re.compile(rf"(?:[\s\d\[\](),+\-*/^'\"=]|(?<=\d)\.|\.(?=\d)|(?<!\w){_FUNCTION}\(|[A-Za-z](?![\w\s]*\())*")


@dataclass(frozen=True)
class ReasoningGymVerifier(Verifier):
    r"""The data set's own score of the answer is 1; partial scores are wrong.

    The answer is the last ``<answer>...</answer>``, else the last ``\boxed{...}``. Eight data sets evaluate the answer
    as Python: for these, what is neither the gold answer nor made of numbers, lists and elementary functions alone is
    unparsable. The problem's id says how to make the entry again; ValueError when that gives another question.

    Args:
        max_length: characters of an answer beyond which it is not looked at.
    """

    max_length: int = 4000

    def grade(self, problem: Problem, text: str) -> Verdict:
        answer = last_tagged(text)
        answer = (last_boxed(text) if answer is None else answer) or ""
        answer = answer.strip()
        if not acceptable(answer, self.max_length):
            return UNPARSABLE
        if answer == problem.answer.strip():
            return Verdict(correct=True, status="graded", answer=answer)
        entry = EntryId.parse(problem.id)
        if entry.dataset in _EVALUATING and not _INERT.fullmatch(answer):
            return UNPARSABLE
        dataset = gym_dataset(entry.dataset, entry.seed, entry.size, entry.options)
        row = dataset[entry.index]
        if row["question"] != problem.text:
            raise ValueError(f"problem {problem.id!r}: made again, expected {problem.text!r}, got {row['question']!r}")
        return Verdict(correct=dataset.score_answer(answer, row) == 1, status="graded", answer=answer)

    def canonical(self, problem: Problem) -> str:
        return f"<answer>{problem.answer}</answer>"

    def warm_up(self) -> None:
        load_package()
