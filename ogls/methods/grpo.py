"""GRPO (arXiv 2402.03300): reinforcement by how much better a rollout did than its group."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.advantage import Advantage, GroupRelative
from ogls.lessons.privilege import Privilege, Unprivileged
from ogls.loss import policy_gradient
from ogls.loss.objective import Mixture, Objective, ReferenceKL
from ogls.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class GRPO(Method):
    """GRPO, as most use it today, without a KL to a reference: nobody reads anything, nobody teaches.

    A    = (reward - mean of the group) / standard deviation of the group
    loss = -mean over rollouts of mean_t min(r_t A, clip(r_t, 0.8, 1.2) A)        r_t = student(y_t) / sampler(y_t)
    """

    privilege: Privilege = Unprivileged()
    objective: Objective = policy_gradient.GRPO()
    advantage: Advantage | None = GroupRelative()


@dataclass(frozen=True, kw_only=True)
class GRPOWithKL(GRPO):
    """GRPO with the KL of its paper (equation 3): loss = GRPO's + 0.04 KL(student || start), exact at every token."""

    objective: Objective = Mixture([policy_gradient.GRPO(), ReferenceKL()], [1.0, 0.04])
