"""Sampled-token OPSD is distillation by reinforcement of each sampled token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogls.lessons.privilege import Privilege, ReferenceSolution
from ogls.loss.chunked import chunked_logprobs
from ogls.loss.objective import Objective, States, Target, Term
from ogls.loss.steering import Steering
from ogls.methods.base import Method
from ogls.records import Lesson, Need


@dataclass(frozen=True)
class SampledToken(Term):
    """The sampled-token term reinforces each token by how much likelier it is to the target than to the student.

        -sum_t w_t r_t A_t        A_t = log p_target(y_t) - log p_student(y_t), taken as a constant
                                  r_t = p_student(y_t) / p_sampler(y_t)

    Over tokens that the student samples, the mean of this loss is KL(student || target), and its mean gradient is that
    of the KL: one sample per token takes the place of the sum over the vocabulary.

    Its metrics are ``advantage`` and ``logprob``, the student's log-probability of the token.

    Args:
        temperature: divisor of the logits of target and student; rollouts have to be drawn at the same temperature
    """

    temperature: float = 1.0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"rollouts", "logprobs"})

    def target(self, steering: Steering) -> Target | None:
        return Target("teacher", steering)

    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        return lesson.token_weights if lesson.views else (0.0,) * len(lesson.token_weights)

    def __call__(self, states: States) -> tuple[Tensor, dict[str, Tensor]]:
        if states.hidden_target is None or states.old_logprobs is None:
            raise ValueError("SampledToken needs the target's states and the sampler's log-probs, got None")
        head, ids = (states.head_weight, states.head_bias), states.token_ids
        logprob = chunked_logprobs(states.hidden_student, *head, ids, temperature=self.temperature)
        with torch.no_grad():
            target = chunked_logprobs(states.hidden_target, *states.target_head, ids, temperature=self.temperature)
            advantage = target - logprob
        ratio = torch.exp((logprob - states.old_logprobs.to(logprob.dtype)).clamp(max=20.0))  # no infinity
        loss = -(states.token_weights.to(logprob.dtype) * ratio * advantage).sum()
        return loss, {"advantage": advantage, "logprob": logprob.detach()}


@dataclass(frozen=True, kw_only=True)
class SampledTokenOPSD(Method):
    """SampledTokenOPSD is OPSD by the sampled token alone; its frozen teacher reads the reference solution s.

        loss = -mean_t r_t (log teacher(y_t | x, s, y_<t) - log student(y_t | x, y_<t))

    r_t is the ratio of `SampledToken`. Most libraries for reinforcement do on-policy distillation in this way, with
    another model as teacher. This project's decisions are OPSD's teacher, all tokens, and temperature 1.
    """

    privilege: Privilege = ReferenceSolution()
    objective: Objective = SampledToken()
