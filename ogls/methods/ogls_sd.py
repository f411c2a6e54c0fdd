"""OGLS-SD and its ablations (arXiv 2605.12400): outcome-guided logit steering."""

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
    """OGLS-SD, version 1 (arXiv 2605.12400, algorithm 1) steers a plain teacher by what right and wrong attempts say.

    Of every wrong rollout y of problem x, and with the frozen start as teacher:

        P+ = {reference solution, if there is one} + {right rollouts of x}        P- = {wrong rollouts of x}

        z_t(g)   = teacher's logits of y_t after x, one attempt g to read, and y_<t       (one pass per attempt)
        zbar+_t  = mean of z_t(g) over g in P+            zbar-_t = mean over g in P-
        target_t = softmax(z0_t + alpha (zbar+_t - zbar-_t))          z0_t: the teacher reads x alone
        loss     = mean_t KL(target_t || student(. | x, y_<t))        over the first 1,024 tokens of each y

    The same words stand around right and wrong attempts, so that what the words do to the logits cancels in the
    difference. Right rollouts are not learned; groups that are all right, or in which a pool is empty, give nothing.

    Published: 8 rollouts per problem at temperature 1.1, each summand of the KL clamped to ±0.05, alpha rising linearly
    to 3. The length of that rise is not published (here 100 steps), nor is the direction of the KL certain: equation
    16 prints KL(student || target), readers of version 2 report the forward KL, which is taken here.
    """

    privilege: Privilege = PeerOutcomes()
    teacher: Teacher = Frozen()
    steering: Steering = OutcomeSteering(alpha=3.0, ramp_steps=100)
    objective: Objective = Distillation(ForwardKL(), clip=0.05)
    selection: TokenSelection = FirstTokens(1024)
    temperature: float = 1.1


@dataclass(frozen=True, kw_only=True)
class OGLS_SD_v2(OGLS_SD):
    """OGLS-SD, version 2, adds the likelihood of how short right rollouts end, against growing length.

        loss = OGLS-SD's + 0.1 * mean over the last 128 tokens of short right rollouts of -log student(y_t)

    Neither the factor nor what counts as short is published: here 0.1, and shorter than the group's median.
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

    It is no paper's method; `ogls.loss.alpha_bound` has the bound.
    """

    steering: Steering = BoundedSteering(epsilon=0.1, alpha_max=3.0)
