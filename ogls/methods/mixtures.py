"""Methods beside each other in one step: no paper's, but what the terms of an objective are for."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.advantage import Advantage, GroupRelative
from ogls.loss.divergence import ForwardKL
from ogls.loss.objective import Distillation, Mixture, Objective
from ogls.loss.policy_gradient import GRPO
from ogls.methods.ogls_sd import OGLS_SD


@dataclass(frozen=True, kw_only=True)
class GRPO_OGLS_SD(OGLS_SD):
    """GRPO and OGLS-SD in one step: all rollouts of mixed groups are reinforced, wrong ones are distilled as well.

    loss = GRPO's + OGLS-SD's        at temperature 1, which the ratios of GRPO are taken at
    """

    objective: Objective = Mixture([GRPO(), Distillation(ForwardKL(), clip=0.05)])
    advantage: Advantage | None = GroupRelative()
    temperature: float = 1.0
