"""Multiple choice is judged by the letter that a text chooses."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ogls.records import Problem, Verdict
from ogls.tasks.answers import after_thinking, judged, last_boxed, last_tagged, unparsable
from ogls.tasks.base import Verifier

_LEADING = re.compile(r"[\s(*$]*(?:\\(?:text|mathrm|textbf)\s*\{\s*)?\(?([A-Za-z])(?:\s*|\s*[).:*}$,].*)", re.DOTALL)
_STATED = re.compile(
    r"answer(?:\s++is)?+(?:\s*+:\s*+|\s++)[(*$]*+([A-Z])(?=\s*+[).:,;*$]|\s*$)", re.IGNORECASE | re.MULTILINE
)


@dataclass(frozen=True)
class ChoiceVerifier(Verifier):
    r"""A text is right if the letter that it chooses is the gold letter.

    The first of these places that exists decides: ``<answer>B</answer>``, ``\boxed{B}``, the last "Answer: B" or "the
    answer is B". Inside the tag or box, a separator and the option's text may follow the letter ("B: 1.69").

    Args:
        choices: letters that can be chosen
        strict: whether only the ``<answer>`` tag counts
        after_thinking: whether only what follows the last ``</think>`` counts
    """

    choices: str = "ABCD"
    strict: bool = False
    after_thinking: bool = True

    def grade(self, problem: Problem, text: str) -> Verdict:
        letter = self._letter(after_thinking(text) if self.after_thinking else text)
        if letter is None or letter not in self.choices:
            return unparsable(f"No choice was found: expected one letter of {', '.join(self.choices)}.")
        return judged(letter == problem.answer.strip(), letter)

    def canonical(self, problem: Problem) -> str:
        return f"<answer>\n{problem.answer}\n</answer>"

    def gold_key(self, problem: Problem) -> str:
        return problem.answer

    def _letter(self, text: str) -> str | None:
        tagged = last_tagged(text)
        if tagged is not None or self.strict:
            return _leading_letter(tagged or "")
        boxed = last_boxed(text)
        if boxed is not None:
            return _leading_letter(boxed)
        stated = [found[1] for found in _STATED.finditer(text)]
        return stated[-1].upper() if stated else None


def _leading_letter(text: str) -> str | None:
    """Returns B for "B", " (b) ", "B: 1.69", "\\text{B}"; None for "Both", "A or B", "I am not sure"."""
    found = _LEADING.fullmatch(text)
    return found[1].upper() if found else None
