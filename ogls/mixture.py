"""Several roles of the signal in one step: distillation beside reinforcement, likelihood beside distillation."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.objective import Objective, Term


@dataclass(frozen=True)
class Mixture(Objective):
    """sum_i factor_i * mean of objective_i over its own tokens: several roles of the signal in one step.

    GRPO beside a distillation, for example: all rollouts of mixed groups carry advantages, those with views are
    distilled as well. Where the same tokens count for several terms, they share the student's pass.
    """

    objectives: tuple[Objective, ...]
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.objectives or len(self.objectives) != len(self.factors):
            raise ValueError(
                f"Mixture needs one factor an objective, got {len(self.factors)} for {len(self.objectives)} objectives"
            )
        if min(self.factors) <= 0:
            raise ValueError(f"Mixture needs factors above 0, got {self.factors}")

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        pairs = zip(self.factors, self.objectives, strict=True)
        return tuple((factor * inner, term) for factor, objective in pairs for inner, term in objective.terms)
