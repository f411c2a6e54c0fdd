"""TIP (arXiv 2604.14084) distils tokens of high entropy or high divergence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ogls.lessons.privilege import Privilege, ReferenceSolution
from ogls.loss.divergence import ReverseKL
from ogls.loss.entropy import student_entropy
from ogls.loss.objective import Distillation, Objective, States
from ogls.loss.weighting import TokenWeighting
from ogls.methods.base import Method
from ogls.methods.high_entropy import lesson_rows, top_share


@dataclass(frozen=True)
class SoftOr(TokenWeighting):
    """Soft-OR weighting keeps the tokens of each rollout whose entropy h or divergence d is high.

        score = h + d - h d        h and d each from 0 at the rollout's lowest to 1 at its highest

    Args:
        share: share of a rollout's tokens that is kept
        entropy_quantile: quantile of the rollout's entropies, to which higher ones are cut before h is scaled
    """

    share: float = 0.5
    entropy_quantile: float = 0.98

    def __post_init__(self) -> None:
        if not (0.0 < self.share <= 1.0 and 0.0 < self.entropy_quantile <= 1.0):
            raise ValueError(
                f"SoftOr needs share and entropy_quantile in (0, 1], got {self.share} and {self.entropy_quantile}"
            )

    def __call__(
        self, states: States, divergence: Float[Tensor, " tokens"], temperature: float
    ) -> Float[Tensor, " tokens"]:
        entropy = student_entropy(states.hidden_student, states.head_weight, states.head_bias, temperature)
        scores = torch.zeros_like(entropy)
        for rows in lesson_rows(states):
            own = entropy[rows]
            h, d = scaled(own.clamp(max=own.quantile(self.entropy_quantile))), scaled(divergence[rows])
            scores[rows] = (h + d - h * d).to(scores.dtype)
        return top_share(scores, states, self.share)


def scaled(values: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Returns the values scaled linearly: 0 for the lowest, 1 for the highest; 0 for all if they are the same."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


@dataclass(frozen=True, kw_only=True)
class TIP(Method):
    """TIP distils half of a rollout's tokens: those with a high soft-OR of student entropy and divergence.

        loss = mean of KL(student || teacher) over the kept tokens, at temperature 1

    A public reproduction takes from the paper this score, the cut of the entropy at its 98th percentile, 50 % of each
    rollout, and the reverse KL. The paper's teacher is a larger model without privilege, and h and d are scaled over
    the whole batch. This project's decisions are that the frozen student teaches and reads the reference solution, and
    that h and d are scaled within each rollout, so that micro-batches make no difference.
    """

    privilege: Privilege = ReferenceSolution()
    objective: Objective = Distillation(ReverseKL(), weighting=SoftOr(0.5))
