"""The KL to the base says how far training has moved the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from ogls.loss.chunked import chunked_divergence
from ogls.loss.divergence import ReverseKL
from ogls.policy.microbatch import micro_batches
from ogls.policy.policy import Policy
from ogls.policy.states import student_states
from ogls.records import Lesson, RolloutGroup


@torch.no_grad()
def kl_to_base(
    policy: Policy,
    groups: Sequence[RolloutGroup],
    budget: int,
    at_start: Callable[[], AbstractContextManager[object]],
) -> float:
    """Returns the mean of KL(student || base) over the tokens of each problem's first rollout, in nats per token.

    The base is the student before its first update. The KL at each token is exact, over the whole vocabulary. The
    rollouts are the student's own, so that the mean is over texts that it writes.

    Args:
        policy: student
        groups: rollouts of the student, one group per problem
        budget: prompt and rollout tokens in one pass
        at_start: function that gives a context in which `policy` has the weights that it started with
    """
    lessons = []
    for group in groups:
        ids = group.rollouts[0].completion.token_ids
        lesson = Lesson(
            problem_id=group.problem.id, prompt_ids=group.prompt_ids, token_ids=ids, token_weights=(1.0,) * len(ids)
        )
        lessons.append(lesson)
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    for some in micro_batches(lessons, budget):
        student = student_states(policy, some)
        with at_start():
            base, head = student_states(policy, some), policy.lent_head
        divergences, _ = chunked_divergence(student, base, *policy.head, ReverseKL(), head_target=head)
        total += divergences.sum()
    return float(total) / sum(lesson.num_learned for lesson in lessons)
