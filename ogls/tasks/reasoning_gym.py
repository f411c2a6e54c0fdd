"""Problems of the reasoning-gym package are scored by their own data set."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

from ogls.records import Problem, Verdict
from ogls.tasks.answers import acceptable, after_thinking, judged, last_boxed, last_tagged, unparsable
from ogls.tasks.base import ProblemSource, Verifier

# The entries of these follow Python's random order of sets: another process makes other problems from the same seed.
_UNSTABLE = frozenset({"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"})


@dataclass(frozen=True)
class EntryId:
    """An entry id says which entry of which data set a problem is, so that another process can make it again.

    Its text is the problem's id, such as ``chain_sum-seed7-size500-42``, with options at the end, such as
    ``-{"max_terms": 4}``.
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
        """Returns the entry id that a problem's id states. Raises ValueError where it states none."""
        found = re.fullmatch(r"(\w+)-seed(\d+)-size(\d+)-(\d+)(?:-(\{.*\}))?", text, re.DOTALL)
        if not found:
            raise ValueError(f"expected the id of a reasoning-gym problem (chain_sum-seed7-size500-42), got {text!r}")
        return cls(found[1], int(found[2]), int(found[3]), int(found[4]), found[5] or "{}")


def load_package() -> ModuleType:
    """Returns the package, which is imported at the first use since that takes a second.

    One of its dependencies gives a warning when it is compiled, which is silenced.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return importlib.import_module("reasoning_gym")


@lru_cache(maxsize=64)
def gym_dataset(name: str, seed: int, size: int, options: str) -> Any:
    """Returns a data set of the package. Raises ValueError where the name or an option is unknown."""
    try:
        return load_package().create_dataset(name, seed=seed, size=size, **json.loads(options))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym data set {name!r} with options {options}: {error}") from error


@dataclass(frozen=True)
class ReasoningGym(ProblemSource):
    """This source has the entries of one procedural data set of the reasoning-gym package.

    Args:
        dataset: name of the data set, such as ``chain_sum``; one without exactly one gold answer per entry is refused
        size: number of problems
        seed: seed of the problems
        options: options of the data set, such as ``{max_terms: 4}``
        system: system message of every problem, which says where the answer goes

    Raises:
        ValueError: the data set or an option is unknown, or the problems cannot be made again in another process.
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


_NO_ANSWER = r"No answer was found: it has to stand in <answer></answer> or \boxed{}."
# The scores of these data sets evaluate the answer as Python in some way.
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
# This allows expressions and lists only: no underscore, brace, colon or attribute, and calls of these functions alone.
_FUNCTION = r"(?:sin|cos|tan|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt)"
_INERT = re.compile(
    rf"(?:[\s\d\[\](),+\-*/^'\"=]|(?<=\d)\.|\.(?=\d)|(?<!\w){_FUNCTION}\(|[A-Za-z][A-Za-z\d\s]*+(?![\w(]))*+"
)


@dataclass(frozen=True)
class ReasoningGymVerifier(Verifier):
    r"""A text is right if its answer has score 1 by the data set itself; a partial score is wrong.

    The answer is in the last ``<answer>...</answer>``, else in the last ``\boxed{...}``. Eight data sets evaluate the
    answer as Python. For these, an answer is unparsable unless it is the gold answer or consists of numbers, lists and
    elementary functions alone. The entry is made again from the problem's id.

    Args:
        max_length: largest number of characters of an answer; a longer one is unparsable
        after_thinking: whether only what follows the last ``</think>`` counts

    Raises:
        ValueError: the entry that is made again has another question than the problem.
    """

    max_length: int = 4000
    after_thinking: bool = True

    def grade(self, problem: Problem, text: str) -> Verdict:
        text = after_thinking(text) if self.after_thinking else text
        answer = last_tagged(text)
        answer = (last_boxed(text) if answer is None else answer) or ""
        answer = answer.strip()
        if not acceptable(answer, self.max_length):
            return unparsable(_NO_ANSWER)
        if answer == problem.answer.strip():
            return judged(True, answer)
        entry = EntryId.parse(problem.id)
        if entry.dataset in _EVALUATING and not _INERT.fullmatch(answer):
            return unparsable("The answer cannot be read: expected numbers, lists or elementary functions.")
        dataset = gym_dataset(entry.dataset, entry.seed, entry.size, entry.options)
        row = dataset[entry.index]
        if row["question"] != problem.text:
            raise ValueError(f"problem {problem.id!r}: made again, expected {problem.text!r}, got {row['question']!r}")
        return judged(dataset.score_answer(answer, row) == 1, answer)

    def canonical(self, problem: Problem) -> str:
        return f"<answer>{problem.answer}</answer>"

    def warm_up(self, kinds: Collection[str]) -> None:
        load_package()
