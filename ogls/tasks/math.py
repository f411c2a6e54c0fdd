"""Mathematical answers: what the last box says is what the gold answer says."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from ogls.records import Problem, Verdict
from ogls.tasks.answers import UNPARSABLE, acceptable, after_thinking, last_boxed, last_boxes
from ogls.tasks.base import Verifier
from ogls.tasks.expressions import refused
from ogls.tasks.numerals import plain_number
from ogls.tasks.reading import Reading, Value, read, read_gold, same

__all__ = ["MathVerifier", "plain_number", "refused"]

_IN_TEXT = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?")

_BLANKS = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # those between two digits are not without meaning


@dataclass(frozen=True)
class MathVerifier(Verifier):
    r"""The last ``\boxed{...}`` says what the gold answer says.

    Numbers are compared exactly, as fractions ("1,080" is "1080.0"); formulas by latex2sympy2-extended and math-verify,
    which turn LaTeX into sympy expressions by a grammar, never by evaluating text. Words and units after a value,
    markdown and a full stop make no difference; a unit that both sides know, the base of a numeral and the left side of
    an equation do. Boxes with nothing but commas, "and" or "or" between them are one list, which is wrong where one
    value is asked for.
    Unparsable: no box, nothing in it, more than `max_length` characters, nested more than 12 deep, towers of powers,
    huge exponents and factorials, an answer that contradicts itself (11 = 10), all that cannot be read, and every
    answer to a problem whose gold answer cannot be read. What is slow nonetheless is ended by the pool.

    Args:
        last_number: where there is no box, take the last number of the text.
        max_length: characters of an answer beyond which it is not looked at.
        after_thinking: judge only what follows the last ``</think>``, and nothing while a ``<think>`` is open.
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
            return UNPARSABLE
        golds = self._gold(problem.answer)
        if not golds or refused(answer):
            return UNPARSABLE
        if _spelling(answer) == _spelling(problem.answer):
            return Verdict(correct=True, status="graded", answer=_vote(golds, answer))
        readings = read(answer)
        if not readings:
            return UNPARSABLE
        correct = any(same(gold, reading) for gold in golds for reading in readings)
        return Verdict(correct=correct, status="graded", answer=_vote(readings, answer))

    def _gold(self, answer: str) -> tuple[Reading, ...]:
        answer = (last_boxed(answer) or answer).strip()
        return read_gold(answer) if acceptable(answer, self.max_length) and not refused(answer) else ()

    def canonical(self, problem: Problem) -> str:
        return f"\\boxed{{{problem.answer}}}"

    def gold_key(self, problem: Problem) -> str:
        return problem.answer

    def warm_up(self) -> None:
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
        self.grade(Problem(id="", text="", answer="x+\\frac{1}{2}"), "\\boxed{\\frac{3}{2}+y}")
        self.grade(Problem(id="", text="", answer="[1,x)"), "\\boxed{x<y}")


def _vote(readings: tuple[Reading, ...], answer: str) -> str:
    """One wording for all answers that are the same number."""
    first = readings[0]
    if isinstance(first, Value) and first.terms[0].number is not None and first.terms[0].base == 10:
        return str(first.terms[0].number)
    return _spelling(answer)


def _spelling(answer: str) -> str:
    return _BLANKS.sub("", answer)
