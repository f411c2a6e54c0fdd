"""Teacher states: every distinct view runs once, shared by all rollouts that use it, and only a sum is kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ogls.loss.steering import Steering
from ogls.policy.microbatch import budgeted
from ogls.policy.policy import Policy
from ogls.records import Lesson


@torch.no_grad()
def view_states(policy: Policy, steering: Steering, lessons: Sequence[Lesson], budget: int) -> tuple[Tensor, Tensor]:
    """Anchor and direction for the first `num_learned` tokens of every lesson.

        anchor_t = sum_c a_c h_c,t        direction_t = sum_c d_c h_c,t

    over the views c, with the coefficients of `steering.mixture`; h_c,t is the final-norm hidden state that predicts
    token t under view c. Views with two zeros are not run, and tokens after a lesson's last weight, like lessons
    without views, are left at 0. The plain view is laid out exactly as the student's own pass (`student_states`), so
    that equal weights give equal states to the last bit, and alpha = 0 a loss of exactly 0: an optimiser that divides
    by the gradient's size would make full steps of mere rounding.

    Returns:
        Two tensors [tokens, d] in fp32, the lessons' tokens one after the other. Memory does not grow with the number
        of views: at most `budget` tokens are in flight.
    """
    suffixes = [lesson.token_ids[: lesson.num_weighted] for lesson in lessons]
    users: dict[tuple[int, ...], list[tuple[int, float, float]]] = defaultdict(list)
    plain: list[tuple[int, float, float]] = []
    for index, lesson in enumerate(lessons):
        if not lesson.views:
            continue
        coefficients = steering.mixture([view.role for view in lesson.views])
        for view, to_anchor, to_direction in zip(lesson.views, *coefficients, strict=True):
            if to_anchor or to_direction:
                to = plain if view.role == "plain" else users[view.prefix_ids]
                to.append((index, to_anchor, to_direction))

    def cost(prefix: tuple[int, ...]) -> int:
        return len(prefix) + sum(len(suffixes[index]) for index, _, _ in users[prefix])

    weight, _ = policy.head
    lengths = [lesson.num_learned for lesson in lessons]
    anchor = torch.zeros(sum(lengths), weight.shape[1], device=weight.device)
    direction = torch.zeros_like(anchor)
    anchors, directions = anchor.split(lengths), direction.split(lengths)

    def add(piece: Tensor, index: int, to_anchor: float, to_direction: float) -> None:
        scored = len(suffixes[index])
        anchors[index][:scored].add_(piece[:scored], alpha=to_anchor)
        directions[index][:scored].add_(piece[:scored], alpha=to_direction)

    if plain:
        pieces = student_states(policy, lessons).split(lengths)
        for use in plain:
            add(pieces[use[0]], *use)
    for prefixes in budgeted(sorted(users, key=len), cost, budget):
        uses = [use for prefix in prefixes for use in users[prefix]]
        owners = [owner for owner, prefix in enumerate(prefixes) for _ in users[prefix]]
        states = policy.hidden(prefixes, [suffixes[index] for index, _, _ in uses], owners)
        for piece, use in zip(states.split([len(suffixes[index]) for index, _, _ in uses]), uses, strict=True):
            add(piece, *use)
    return anchor, direction


def student_states(policy: Policy, lessons: Sequence[Lesson]) -> Tensor:
    """States [tokens, d] of the learned tokens after the student's own prompts: its own pass and the plain view."""
    prompts = list(dict.fromkeys(lesson.prompt_ids for lesson in lessons))
    owners = [prompts.index(lesson.prompt_ids) for lesson in lessons]
    return policy.hidden(prompts, [lesson.token_ids[: lesson.num_learned] for lesson in lessons], owners)
