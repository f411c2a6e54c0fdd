"""Mathematical answers are compared as numbers, as text, or by math-verify."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from ogls.records import Problem, Verdict
from ogls.tasks.answers import UNPARSABLE, acceptable, last_boxed
from ogls.tasks.base import Verifier

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|[+-]?\.\d+")
_IN_TEXT = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?")
_ORNAMENTS = re.compile(r"\\?\$|\\[,!;]|\{(?=,\})|(?<=,)\}")
_MAX_DEPTH = 12
_REFUSED = (
    re.compile(r"\^\s*[{(]*\s*[+-]?\d{5,}"),  # 2^{100000}
    re.compile(r"\^\s*[{(]*\s*\d+\s*\^\s*[{(]*\s*\d"),  # 9^{9^9}
    re.compile(r"\d\s*\^\s*\{?\d+\}?\s*[)}]+\s*\^\s*\{?\d\d"),  # (9^{99})^{99}
    re.compile(r"\d{4,}\s*!|[)}!\]]\s*!"),  # 10000!, (10!)!
    re.compile(r"binom\s*\{?\s*\d{5,}|\d{5,}\s*\\choose"),  # \binom{100000}{5}
)


@dataclass(frozen=True)
class MathVerifier(Verifier):
    r"""A text is right if its last ``\boxed{...}`` is equal to the gold answer.

    Two plain numbers are compared exactly, as fractions ("1,080" is "1080.0"). Answers of equal spelling are equal. All
    others go to math-verify, which turns LaTeX into sympy expressions by a grammar and never evaluates text.

    A text is unparsable if it has no box, or if its answer is empty, is longer than `max_length`, is nested more than
    12 deep, has a tower of powers, a huge exponent or a huge factorial, or cannot be read by math-verify. The grading
    pool ends what is slow nonetheless.

    Args:
        last_number: whether the last number of a text without a box is its answer
        max_length: largest number of characters of an answer; a longer one is unparsable
    """

    last_number: bool = False
    max_length: int = 400

    def grade(self, problem: Problem, text: str) -> Verdict:
        answer = last_boxed(text)
        if answer is None and self.last_number:
            answer = max(_IN_TEXT.finditer(text), key=lambda found: found.start(), default=[None])[0]
        answer = (answer or "").strip()
        if not acceptable(answer, self.max_length):
            return UNPARSABLE
        number, gold = plain_number(answer), plain_number(problem.answer)
        spelling = _spelling(answer) if number is None else str(number)
        if number is not None and gold is not None:
            return Verdict(correct=number == gold, status="graded", answer=spelling)
        if spelling == _spelling(problem.answer):
            return Verdict(correct=True, status="graded", answer=spelling)
        if refused(answer):
            return UNPARSABLE
        parsed = _parse(answer)
        if not parsed:
            return UNPARSABLE
        from math_verify import verify

        correct = verify(list(_parse_gold(problem.answer)), parsed, timeout_seconds=None)
        return Verdict(correct=correct, status="graded", answer=spelling)

    def canonical(self, problem: Problem) -> str:
        return f"\\boxed{{{problem.answer}}}"

    def warm_up(self) -> None:
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
        self.grade(Problem(id="", text="", answer="x+\\frac{1}{2}"), "\\boxed{\\frac{3}{2}+y}")


def plain_number(text: str) -> Fraction | None:
    """Returns the value of an integer or decimal, with or without commas between thousands; None for other text."""
    bare = _ORNAMENTS.sub("", text).strip().removesuffix(".")
    return Fraction(bare.replace(",", "")) if _NUMBER.fullmatch(bare) and len(bare) < 1000 else None


def refused(answer: str) -> bool:
    """Returns whether its spelling shows that an answer would take unreasonable time or memory to evaluate."""
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest > _MAX_DEPTH or any(pattern.search(answer) for pattern in _REFUSED)


def _spelling(answer: str) -> str:
    return "".join(answer.split())


def _parse(answer: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # Only the LaTeX target: the plain-expression target would evaluate the text as Python.
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse(f"\\boxed{{{answer}}}", config, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _parse_gold(answer: str) -> tuple[Any, ...]:
    return tuple(_parse(answer))
