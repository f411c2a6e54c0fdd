"""GRPO (arXiv 2402.03300) reinforces rollouts that are better than their group."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.advantage import Advantage, GroupRelative
from ogls.lessons.privilege import Privilege, Unprivileged
from ogls.loss import policy_gradient
from ogls.loss.objective import Mixture, Objective, ReferenceKL
from ogls.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class GRPO(Method):
    """GRPO reinforces rollouts by their advantages; as most use it today, it has neither a teacher nor a KL.

    A    = (reward - mean of the group) / standard deviation of the group
    loss = -mean over rollouts of mean_t min(r_t A, clip(r_t, 0.8, 1.2) A)        r_t = student(y_t) / sampler(y_t)
    """

    privilege: Privilege = Unprivileged()
    objective: Objective = policy_gradient.GRPO()
    advantage: Advantage | None = GroupRelative()


@dataclass(frozen=True, kw_only=True)
class GRPOWithKL(GRPO):
    """GRPOWithKL adds the KL of GRPO's paper (equation 3), which keeps the student near its start.

    loss = GRPO's + 0.04 KL(student || start)        exact at every token, over the whole vocabulary
    """

    objective: Objective = Mixture([policy_gradient.GRPO(), ReferenceKL()], [1.0, 0.04])
