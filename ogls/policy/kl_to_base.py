"""How far training has moved the student from the model that it began as."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ogls.loss.chunked import chunked_divergence
from ogls.loss.divergence import ReverseKL
from ogls.policy.microbatch import micro_batches
from ogls.policy.policy import Policy
from ogls.policy.states import student_states
from ogls.records import Lesson, RolloutGroup


@torch.no_grad()
def kl_to_base(policy: Policy, groups: Sequence[RolloutGroup], budget: int) -> float:
    """Mean of KL(student ‖ base) over the tokens of each problem's first rollout, in nats a token.

    The KL at a token is exact, over the whole vocabulary; the rollouts are the student's own, so that their mean
    estimates what it says. The base is the student before its first update (`Policy.at_start`). At most `budget` tokens
    are in flight.
    """
    weight, bias = policy.head
    lessons = []
    for group in groups:
        ids = group.rollouts[0].completion.token_ids
        lesson = Lesson(
            problem_id=group.problem.id, prompt_ids=group.prompt_ids, token_ids=ids, token_weights=(1.0,) * len(ids)
        )
        lessons.append(lesson)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for some in micro_batches(lessons, budget):
        student = student_states(policy, some)
        with policy.at_start():
            base = student_states(policy, some)
        divergences, _ = chunked_divergence(student, base, weight, bias, ReverseKL())
        total += divergences.sum()
    return float(total) / sum(lesson.num_learned for lesson in lessons)
