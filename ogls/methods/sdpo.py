"""SDPO distils a right peer, and feedback where there is any; SRPO divides rollouts between it and GRPO."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.advantage import Advantage, GroupRelative
from ogls.lessons.feedback import Feedback
from ogls.lessons.privilege import Privilege, SuccessfulPeer
from ogls.loss.divergence import JensenShannon
from ogls.loss.objective import Distillation, Mixture, Objective
from ogls.loss.policy_gradient import GRPO
from ogls.loss.topk import TopK
from ogls.methods.base import Method
from ogls.policy.teacher import EMA, Teacher


@dataclass(frozen=True, kw_only=True)
class SDPO(Method):
    """SDPO (arXiv 2601.20802) distils a moving average of the student that reads a right rollout of the same problem.

        loss = mean_t min(student(y_t) / sampler(y_t), 2) JSD_S(teacher(. | x, peer, y_<t), student(. | x, y_<t))

    JSD_S sums over S, the student's 100 likeliest tokens, and one bucket for all others. The teacher's weights follow
    the student's by 0.05 per step. A rollout without a right peer other than itself is not learned. This is SDPO where
    an environment says no more than right or wrong; where it says more, it is `SDPOWithFeedback`.
    """

    privilege: Privilege = SuccessfulPeer()
    teacher: Teacher = EMA(0.95)
    objective: Objective = Distillation(JensenShannon(0.5), support=TopK(100), importance_cap=2.0)


@dataclass(frozen=True, kw_only=True)
class SDPOWithFeedback(SDPO):
    """SDPO (arXiv 2601.20802) with feedback: the teacher also reads what the verifier said of a wrong rollout.

        loss = mean_t min(student(y_t) / sampler(y_t), 2) JSD_S(teacher(. | x, f, peer, y_<t), student(. | x, y_<t))

    f is the feedback on y, behind the problem; right rollouts have none. A wrong rollout without a right peer is
    learned with f alone. All else is as in `SDPO`.
    """

    privilege: Privilege = Feedback(SuccessfulPeer())


@dataclass(frozen=True, kw_only=True)
class SRPO(Method):
    """SRPO (after arXiv 2604.02288) distils wrong rollouts that have a right peer, and reinforces all others.

        loss = GRPO's over the rollouts without a teacher + SDPO's over those with one

    The teacher is frozen here.
    """

    privilege: Privilege = SuccessfulPeer(rollouts="wrong")
    objective: Objective = Mixture([GRPO(), Distillation(JensenShannon(0.5), support=TopK(100), importance_cap=2.0)])
    advantage: Advantage | None = GroupRelative(routed=True)
