"""On-policy distillation has another model teach on what the student samples."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.privilege import Privilege, ProblemAlone
from ogls.loss.divergence import ReverseKL
from ogls.loss.objective import Distillation, Objective
from ogls.loss.steering import Plain, Steering
from ogls.methods.base import Method
from ogls.policy.teacher import OtherModel, Teacher


@dataclass(frozen=True, kw_only=True)
class OnPolicyDistillation(Method):
    """OnPolicyDistillation (GKD, arXiv 2306.13649) distils another model on every token of the student's rollouts.

        loss = mean_t KL(student(. | x, y_<t) || teacher(. | x, y_<t))        y ~ student(. | x), held fixed

    This is the reverse KL, exact over the vocabulary. Both models read the problem alone; no verdict is used. GKD calls
    this its on-policy setting, and also takes the forward KL and Jensen-Shannon divergences: `--method.objective
    Distillation --method.objective.divergence ForwardKL`. The default teacher is that of Thinking Machines' report of
    2025, which takes the KL of sampled tokens alone, as a reward: `--method.objective
    ogls.methods.sampled_token.SampledToken`. What the teacher reads is a choice of its own: `--method.privilege
    ReferenceSolution --method.steering Unsteered`.
    """

    privilege: Privilege = ProblemAlone()
    teacher: Teacher = OtherModel("Qwen/Qwen3-32B")
    steering: Steering = Plain()
    objective: Objective = Distillation(ReverseKL())
