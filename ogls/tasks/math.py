"""Mathematical answers are read, and what they say is compared."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass

from ogls.records import Problem, Verdict
from ogls.tasks.answers import acceptable, after_thinking, judged, last_boxed, last_boxes, unparsable
from ogls.tasks.base import Verifier
from ogls.tasks.expressions import refused
from ogls.tasks.reading import read, read_gold
from ogls.tasks.statements import Statement, Value, same

_IN_TEXT = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?")

_NO_BOX = r"No final answer was found: it has to stand in \boxed{}."
_UNREADABLE = r"The final answer in \boxed{} cannot be read as a value, an expression or a list."
_BLANKS = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # those between two digits are not without meaning


@dataclass(frozen=True)
class MathVerifier(Verifier):
    r"""A text is right if its last ``\boxed{...}`` says what the gold answer says.

    Numbers are compared exactly, as fractions ("1,080" is "1080.0"). Formulas go to latex2sympy2-extended and
    math-verify, which turn LaTeX into sympy expressions by a grammar and never evaluate text. Words and units after a
    value, markdown and a full stop make no difference; a unit that both sides know, the base of a numeral and the left
    side of an equation do. Boxes with nothing but commas, "and" or "or" between them are one list, which is wrong where
    one value is asked for.

    A text is unparsable if it has no box, or if its answer is empty, is longer than `max_length`, is nested more than
    12 deep, has a tower of powers, a huge exponent or a huge factorial, contradicts itself (11 = 10), or cannot be
    read; so is every text where the gold answer cannot be read. The grading pool ends what is slow nonetheless.

    Args:
        last_number: whether the last number of a text without a box is its answer
        max_length: largest number of characters of an answer; a longer one is unparsable
        after_thinking: whether only what follows the last ``</think>`` counts, and nothing while a ``<think>`` is open
    """

    last_number: bool = False
    max_length: int = 400
    after_thinking: bool = True

    def grade(self, problem: Problem, text: str) -> Verdict:
        text = after_thinking(text) if self.after_thinking else text
        found = last_boxes(text)
        if not found and self.last_number:
            found = [max(_IN_TEXT.finditer(text), key=lambda found: found.start(), default=[""])[0]]
        answer = ", ".join(found).strip()
        if not acceptable(answer, self.max_length):
            return unparsable(_UNREADABLE if answer else _NO_BOX)
        golds = self._gold(problem.answer)
        if not golds or refused(answer):
            return unparsable(_UNREADABLE)
        if _spelling(answer) == _spelling(problem.answer):
            return judged(True, _vote(golds, answer), answer)
        readings = read(answer)
        if not readings:
            return unparsable(_UNREADABLE)
        correct = any(same(gold, reading) for gold in golds for reading in readings)
        return judged(correct, _vote(readings, answer), answer)

    def _gold(self, answer: str) -> tuple[Statement, ...]:
        answer = (last_boxed(answer) or answer).strip()
        return read_gold(answer) if acceptable(answer, self.max_length) and not refused(answer) else ()

    def canonical(self, problem: Problem) -> str:
        return f"\\boxed{{{problem.answer}}}"

    def gold_key(self, problem: Problem) -> str:
        return problem.answer

    def warm_up(self, kinds: Collection[str]) -> None:
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
        self.grade(Problem(id="", text="", answer="x+\\frac{1}{2}"), "\\boxed{\\frac{3}{2}+y}")
        self.grade(Problem(id="", text="", answer="[1,x)"), "\\boxed{x<y}")


def _vote(readings: tuple[Statement, ...], answer: str) -> str:
    """Returns one wording for all answers that are the same number."""
    first = readings[0]
    if isinstance(first, Value) and first.terms[0].number is not None and first.terms[0].base == 10:
        return str(first.terms[0].number)
    return _spelling(answer)


def _spelling(answer: str) -> str:
    return _BLANKS.sub("", answer)
