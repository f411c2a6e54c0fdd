"""OPSD (arXiv 2601.18734) distils a teacher that reads the reference solution."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.privilege import Privilege, ReferenceSolution
from ogls.lessons.selection import FirstTokens, TokenSelection
from ogls.loss.divergence import ForwardKL
from ogls.loss.objective import Distillation, Objective
from ogls.loss.steering import Steering, Unsteered
from ogls.methods.base import Method
from ogls.policy.teacher import Frozen, Teacher


@dataclass(frozen=True, kw_only=True)
class OPSD(Method):
    """OPSD, as released, distils a frozen teacher that reads the reference solution s, on every rollout y.

        loss = mean_t KL(teacher(. | x, s, y_<t) || student(. | x, y_<t))        over the first 1,024 tokens

    Teacher and student have temperature 1.1, and each summand of the KL is clamped to at most 0.05, from above alone.
    Rollouts are drawn at temperature 1.1 from the 20 likeliest tokens within a mass of 0.95.
    """

    privilege: Privilege = ReferenceSolution()
    teacher: Teacher = Frozen()
    steering: Steering = Unsteered()
    objective: Objective = Distillation(ForwardKL(), temperature=1.1, clip=0.05, one_sided=True)
    selection: TokenSelection = FirstTokens(1024)
    temperature: float = 1.1
    top_p: float = 0.95
    top_k: int = 20
