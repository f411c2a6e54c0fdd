"""Mixtures are methods that share one step; no paper has published them."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.advantage import Advantage, GroupRelative
from ogls.loss.divergence import ForwardKL
from ogls.loss.objective import Distillation, Mixture, Objective
from ogls.loss.policy_gradient import GRPO
from ogls.methods.ogls_sd import OGLS_SD


@dataclass(frozen=True, kw_only=True)
class GRPO_OGLS_SD(OGLS_SD):
    """GRPO_OGLS_SD reinforces all rollouts of mixed groups, and distils the wrong ones as OGLS-SD does.

    loss = GRPO's + OGLS-SD's        with rollouts at temperature 1, at which GRPO takes its ratios
    """

    objective: Objective = Mixture([GRPO(), Distillation(ForwardKL(), clip=0.05)])
    advantage: Advantage | None = GroupRelative()
    temperature: float = 1.0
