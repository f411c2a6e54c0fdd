"""OGLS-SD (arXiv 2605.12400) steers logits by right and wrong attempts."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.privilege import PeerOutcomes, Privilege, Several, ShortSuccesses
from ogls.lessons.selection import FirstTokens, TokenSelection
from ogls.loss.divergence import ForwardKL
from ogls.loss.objective import Distillation, Likelihood, Mixture, Objective
from ogls.loss.steering import BoundedSteering, OutcomeSteering, PositiveMean, PositiveOnly, Steering
from ogls.methods.base import Method
from ogls.policy.teacher import Frozen, Teacher


@dataclass(frozen=True, kw_only=True)
class OGLS_SD(Method):
    """OGLS-SD, version 1 (arXiv 2605.12400, algorithm 1), steers a plain teacher by right and wrong attempts.

    The student samples a group of rollouts of problem x. Its wrong rollouts y are learned. The teacher has the weights
    that training began with, and reads x, one attempt g of a pool, and then y:

        P+ = {reference solution, if there is one} + {right rollouts of x}        P- = {wrong rollouts of x}

        z0_t     = teacher's logits at token t after x and y_<t
        z_t(g)   = teacher's logits at token t after x, g and y_<t    one pass per attempt g
        zbar+_t  = mean of z_t(g) over g in P+                        zbar-_t = mean of z_t(g) over g in P-
        target_t = softmax(z0_t + alpha (zbar+_t - zbar-_t))
        loss     = mean_t KL(target_t || student(. | x, y_<t))        over the first 1,024 tokens of each y

    The same words stand around right and wrong attempts, so that what the words do to the logits cancels in the
    difference. Right rollouts are not learned. A group that is all right, or has an empty pool, gives nothing.

    The paper has 8 rollouts per problem at temperature 1.1, clamps each summand of the KL to ±0.05, and lets alpha rise
    linearly to 3. It does not say how long alpha rises (here 100 steps). The direction of the KL is not certain:
    equation 16 prints KL(student || target), but readers of version 2 report the forward KL, which is taken here.
    """

    privilege: Privilege = PeerOutcomes()  # the views of each wrong rollout: plain, one per g in P+, one per g in P-
    teacher: Teacher = Frozen()  # the weights that read the views: those that training began with
    steering: Steering = OutcomeSteering(alpha=3.0, ramp_steps=100)  # target_t
    objective: Objective = Distillation(ForwardKL(), clip=0.05)  # loss
    selection: TokenSelection = FirstTokens(1024)  # the tokens t
    temperature: float = 1.1  # at which the student samples


@dataclass(frozen=True, kw_only=True)
class OGLS_SD_v2(OGLS_SD):
    """OGLS-SD, version 2, also learns the ends of short right rollouts, against growing length.

        loss = OGLS-SD's + 0.1 * mean over the last 128 tokens of short right rollouts of -log student(y_t)

    Neither the factor nor what counts as short is published. Here they are 0.1, and shorter than the group's median.
    """

    privilege: Privilege = Several([PeerOutcomes(), ShortSuccesses()])
    objective: Objective = Mixture([Distillation(ForwardKL(), clip=0.05), Likelihood()], [1.0, 0.1])


@dataclass(frozen=True, kw_only=True)
class PositiveMeanTeacher(OGLS_SD):
    """The Positive Mean Teacher is OGLS-SD's ablation without a contrast: target = softmax(zbar+)."""

    steering: Steering = PositiveMean()


@dataclass(frozen=True, kw_only=True)
class PositiveOnlySteering(OGLS_SD):
    """Positive-Only Steering is OGLS-SD's ablation without failures: target = softmax(z0 + alpha (zbar+ - z0))."""

    steering: Steering = PositiveOnly(alpha=3.0, ramp_steps=100)


@dataclass(frozen=True, kw_only=True)
class BudgetedOGLS_SD(OGLS_SD):
    """OGLS-SD with a budget takes for each token the largest alpha whose target stays near the plain teacher.

        alpha_t = max {alpha <= 3: KL(target_t(alpha) || softmax(z0_t)) <= 0.1 nats}

    No paper has published it. `ogls.loss.alpha_bound` finds alpha_t.
    """

    steering: Steering = BoundedSteering(epsilon=0.1, alpha_max=3.0)
