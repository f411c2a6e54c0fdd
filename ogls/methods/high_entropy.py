"""High-entropy OPSD distils only the tokens where the student is unsure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ogls.loss.divergence import ForwardKL
from ogls.loss.entropy import student_entropy
from ogls.loss.objective import Distillation, Objective, States
from ogls.loss.weighting import TokenWeighting
from ogls.methods.opsd import OPSD


@dataclass(frozen=True)
class HighEntropy(TokenWeighting):
    """High-entropy weighting keeps those tokens of each rollout at which the student's entropy is highest.

    Args:
        share: share of a rollout's tokens that is kept
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"HighEntropy needs share in (0, 1], got {self.share}")

    def __call__(
        self, states: States, divergence: Float[Tensor, " tokens"], temperature: float
    ) -> Float[Tensor, " tokens"]:
        entropy = student_entropy(states.hidden_student, states.head_weight, states.head_bias, temperature)
        return top_share(entropy, states, self.share)


def top_share(scores: Float[Tensor, " tokens"], states: States, share: float) -> Float[Tensor, " tokens"]:
    """Returns a factor per token that keeps the highest scores of each lesson and is 0 for all other tokens.

        factor = (sum of the lesson's token weights) / (sum of the token weights kept)

    A lesson thus keeps its share of the step's mean. At least one token is kept. Of equal scores the earlier one wins.

    Args:
        scores: score of each token
        states: tokens of the micro-batch
        share: share of a lesson's tokens that is kept
    """
    factors, weights = torch.zeros_like(scores), states.token_weights.to(scores.dtype)
    for rows in lesson_rows(states):
        count = max(1, round(share * len(rows)))
        kept = rows[scores[rows].argsort(descending=True, stable=True)[:count]]
        factors[kept] = weights[rows].sum() / weights[kept].sum()
    return factors


def lesson_rows(states: States) -> Iterator[Tensor]:
    """Yields the indices of the tokens of each lesson, one lesson after the other."""
    if states.lesson_of is None:
        raise ValueError("ranking tokens within their lesson needs lesson_of, got None")
    for lesson in states.lesson_of.unique():
        yield (states.lesson_of == lesson).nonzero().squeeze(1)


@dataclass(frozen=True, kw_only=True)
class HighEntropyOPSD(OPSD):
    """HighEntropyOPSD is OPSD of the 20 % of tokens at which the student is least sure what comes next.

        loss = mean of KL(teacher || student) over the tokens with the highest student entropy, otherwise as in OPSD

    The paper (arXiv 2506.01939) keeps the top 20 % for policy gradients, not for a distillation, and ranks the tokens
    of a whole batch. This project's decisions are to distil them as OPSD does, to rank them within each rollout, so
    that micro-batches make no difference, and to take the entropy at the temperature of the distillation.
    """

    objective: Objective = Distillation(
        ForwardKL(), temperature=1.1, clip=0.05, one_sided=True, weighting=HighEntropy(0.2)
    )
