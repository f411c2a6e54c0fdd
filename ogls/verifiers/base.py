"""What a verifier is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ogls.records import Problem, Verdict


class Verifier(ABC):
    """Judges a text against a problem's gold answer: a pure function of the two.

    Texts are untrusted and some verifiers hand parts of them to large parsers, so training calls verifiers through
    `ogls.grading.GradingPool` only. A verifier travels to the pool's processes by pickle: keep it a frozen dataclass in
    an importable module, and import what is heavy inside its methods.
    """

    @abstractmethod
    def grade(self, problem: Problem, text: str) -> Verdict:
        """Correct or not, and the answer that was found; status "unparsable" where there is none to compare."""

    @abstractmethod
    def canonical(self, problem: Problem) -> str:
        """The shortest text that states the gold answer as a completion should; it has to be graded correct."""

    def warm_up(self) -> None:  # noqa: B027  most verifiers have nothing heavy to import
        """Import what `grade` needs. Called once, before the pool's workers are forked."""
