"""A verifier by kind hands each problem to the verifier of its kind."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field

from ogls.records import Problem, Verdict
from ogls.tasks.base import Verifier
from ogls.tasks.math import MathVerifier
from ogls.tasks.multiple_choice import ChoiceVerifier
from ogls.tasks.reasoning_gym import ReasoningGymVerifier
from ogls.tasks.tool_use import ToolUseVerifier


@dataclass(frozen=True)
class ByKind(Verifier):
    """Each problem goes to the verifier of its kind: ``math``, ``mcq``, ``tooluse``, ``reasoning_gym`` or another one.

    Args:
        verifiers: verifiers of further kinds, or replacements for those of the four built-in kinds
    """

    verifiers: dict[str, Verifier] = field(default_factory=dict)

    def of(self, problem: Problem) -> Verifier:
        """Returns the verifier of this problem. Raises ValueError where its kind is unknown."""
        known = self._all()
        if problem.kind not in known:
            raise ValueError(f"problem {problem.id!r}: no verifier for kind {problem.kind!r}, known: {sorted(known)}")
        return known[problem.kind]

    def grade(self, problem: Problem, text: str) -> Verdict:
        return self.of(problem).grade(problem, text)

    def canonical(self, problem: Problem) -> str:
        return self.of(problem).canonical(problem)

    def gold_key(self, problem: Problem) -> Hashable:
        return problem.kind, self.of(problem).gold_key(problem)

    def warm_up(self, kinds: Collection[str]) -> None:
        for kind, verifier in self._all().items():
            if kind in kinds:
                verifier.warm_up([kind])

    def _all(self) -> dict[str, Verifier]:
        built_in = {
            "math": MathVerifier(),
            "mcq": ChoiceVerifier(),
            "tooluse": ToolUseVerifier(),
            "reasoning_gym": ReasoningGymVerifier(),
        }
        return built_in | self.verifiers
