"""Procedural problems of the reasoning-gym package, scored by their own data set."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

from ogls.records import Problem, Verdict
from ogls.tasks.answers import UNPARSABLE, acceptable, after_thinking, last_boxed, last_tagged
from ogls.tasks.base import ProblemSource, Verifier

# Their entries follow Python's random order of sets: another process makes other problems of the same seed.
_UNSTABLE = frozenset({"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"})


@dataclass(frozen=True)
class EntryId:
    """Which entry of which data set: enough to make it again in another process, metadata included.

    As text, the id of the problem: ``chain_sum-seed7-size500-42``, and ``-{"max_terms": 4}`` at the end for options.
    """

    dataset: str
    seed: int
    size: int
    index: int
    options: str = "{}"

    def __str__(self) -> str:
        end = "" if self.options == "{}" else f"-{self.options}"
        return f"{self.dataset}-seed{self.seed}-size{self.size}-{self.index}{end}"

    @classmethod
    def parse(cls, text: str) -> EntryId:
        found = re.fullmatch(r"(\w+)-seed(\d+)-size(\d+)-(\d+)(?:-(\{.*\}))?", text, re.DOTALL)
        if not found:
            raise ValueError(f"expected the id of a reasoning-gym problem (chain_sum-seed7-size500-42), got {text!r}")
        return cls(found[1], int(found[2]), int(found[3]), int(found[4]), found[5] or "{}")


def load_package() -> ModuleType:
    """The package, imported when first needed: it takes a second, and a dependency of it warns when it is compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return importlib.import_module("reasoning_gym")


@lru_cache(maxsize=64)
def gym_dataset(name: str, seed: int, size: int, options: str) -> Any:
    """The data set; ValueError when the name is unknown or an option does not exist."""
    try:
        return load_package().create_dataset(name, seed=seed, size=size, **json.loads(options))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym data set {name!r} with options {options}: {error}") from error


@dataclass(frozen=True)
class ReasoningGym(ProblemSource):
    """Procedural problems of the reasoning-gym package: entry i of a data set with this seed, size and options.

    Args:
        dataset: its name, such as ``chain_sum``; data sets without one gold answer an entry are refused.
        size: how many problems.
        seed: other seeds give other problems.
        options: of the data set, such as ``{max_terms: 4}``.
        system: the system message, which says where the answer goes.
    """

    dataset: str
    size: int = 500
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    system: str | None = "Reason step by step, then write your final answer, and only that, as <answer>...</answer>."

    def __post_init__(self) -> None:
        if self.size < 1 or self.seed < 0:
            raise ValueError(f"expected size >= 1 and seed >= 0, got size {self.size}, seed {self.seed}")
        if self.dataset in _UNSTABLE:
            raise ValueError(f"reasoning-gym data set {self.dataset!r} differs from process to process: choose another")
        self[0]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(f"expected an index from 0 to {self.size - 1}, got {index}")
        entry = EntryId(self.dataset, self.seed, self.size, index, json.dumps(self.options, sort_keys=True))
        row = gym_dataset(entry.dataset, entry.seed, entry.size, entry.options)[index]
        if not isinstance(row["answer"], str) or not row["answer"].strip():
            raise ValueError(f"reasoning-gym data set {self.dataset!r} has no gold answer, got {row['answer']!r}")
        return Problem(
            id=str(entry),
            text=row["question"],
            answer=row["answer"],
            system=self.system,
            kind="reasoning_gym",
        )


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
_INERT = re.compile(
    rf"(?:[\s\d\[\](),+\-*/^'\"=]|(?<=\d)\.|\.(?=\d)|(?<!\w){_FUNCTION}\(|[A-Za-z][A-Za-z\d\s]*+(?![\w(]))*+"
)


@dataclass(frozen=True)
class ReasoningGymVerifier(Verifier):
    r"""The data set's own score of the answer is 1; partial scores are wrong.

    The answer is the last ``<answer>...</answer>``, else the last ``\boxed{...}``. Eight data sets evaluate the answer
    as Python: for these, what is neither the gold answer nor made of numbers, lists and elementary functions alone is
    unparsable. The problem's id says how to make the entry again; ValueError when that gives another question.

    Args:
        max_length: characters of an answer beyond which it is not looked at.
        after_thinking: judge only what follows the last ``</think>``.
    """

    max_length: int = 4000
    after_thinking: bool = True

    def grade(self, problem: Problem, text: str) -> Verdict:
        text = after_thinking(text) if self.after_thinking else text
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
