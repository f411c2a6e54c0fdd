"""A Python function of the user's own judges texts."""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, ClassVar

from ogls.records import Problem, Verdict
from ogls.tasks.answers import after_thinking
from ogls.tasks.base import Verifier


@dataclass(frozen=True)
class FunctionVerifier(Verifier):
    """A text is right if a function says so: ``function(text, answer)`` returns true, or a number of 1 or more.

    It may return a pair instead, of this and of a text, the feedback. The function runs in the grading processes, where
    it may read, but not write, connect or begin other processes. It does not say which answer a text gives: validations
    have no ``maj_at_k``, and `U_OPSD`, which counts answers, cannot learn from it.

    Args:
        function: where the function is, such as ``rewards.is_right`` for ``is_right`` of rewards.py in the working
            directory
        stated: how a completion states an answer; ``{answer}`` stands for the gold one. The function has to call it
            right, and without that no run begins.
        after_thinking: whether the function gets only what follows the last ``</think>``

    Raises:
        ValueError: there is no such function.
    """

    tells_answers: ClassVar[bool] = False
    function: str
    stated: str = "{answer}"
    after_thinking: bool = True

    def __post_init__(self) -> None:
        if not callable(self._resolved()):
            raise ValueError(f"data.verifier.function {self.function!r} is no function; expected MODULE.NAME of one")

    def grade(self, problem: Problem, text: str) -> Verdict:
        text = after_thinking(text) if self.after_thinking else text
        said = self._resolved()(text, problem.answer)
        value, feedback = said if isinstance(said, tuple) else (said, None)
        correct = float(value) >= 1.0
        feedback = f"The answer is {'right' if correct else 'wrong'}." if feedback is None else feedback
        return Verdict(correct=correct, status="graded", feedback=feedback)

    def canonical(self, problem: Problem) -> str:
        return self.stated.replace("{answer}", problem.answer)

    def gold_key(self, problem: Problem) -> str:
        return problem.answer

    def _resolved(self) -> Any:
        try:
            return resolve_name(self.function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"data.verifier.function {self.function!r} cannot be found: {error}") from error
