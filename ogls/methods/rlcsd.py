"""RLCSD (arXiv 2606.11709) is GRPO whose advantages a contrast shifts."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.advantage import Advantage, GroupRelative
from ogls.lessons.privilege import PeerOutcomes, Privilege
from ogls.loss.objective import Objective
from ogls.loss.policy_gradient import GRPO, Shifted
from ogls.loss.steering import OutcomeContrast, Steering
from ogls.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class RLCSD(Method):
    """RLCSD is GRPO whose advantages the teacher's contrast of a right and a wrong attempt shifts.

        e_t = log teacher(y_t | x, right attempt, y_<t) - log teacher(y_t | x, wrong attempt, y_<t)
        A_t = A + 0.5 tanh(e_t / 0.02), never past zero        loss as in GRPO, with A_t for A

    There is one attempt per pool, never the rollout itself. Right rollouts of mixed groups are shifted as well.
    """

    privilege: Privilege = PeerOutcomes(max_peers=1, exclude_self=True, learn_successes=True)
    steering: Steering = OutcomeContrast()
    objective: Objective = GRPO(shaping=Shifted())
    advantage: Advantage | None = GroupRelative()
