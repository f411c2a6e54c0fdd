"""Teacher states: every distinct view runs once, shared by all rollouts that use it, and only a sum is kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ogls.loss.steering import Steering
from ogls.policy.microbatch import budgeted
from ogls.policy.policy import Policy
from ogls.records import Lesson, View
from ogls.system.step_metrics import timed


@timed("teacher")
@torch.no_grad()
def view_states(
    policy: Policy, steering: Steering, lessons: Sequence[Lesson], num_scored: Sequence[int], budget: int
) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens hidden"]]:
    """Returns anchor and direction of the target for the tokens of every lesson, the lessons one after the other.

        anchor_t = sum_c a_c h_c,t        direction_t = sum_c d_c h_c,t

    over the views c, with the coefficients of the steering; h_c,t is the final-norm hidden state that predicts token t
    under view c. Views with two zeros are not run. A lesson without views has the plain one. The plain view is laid out
    exactly as the student's own pass (`student_states`), so that equal weights give equal states to the last bit, and
    alpha = 0 a loss of exactly 0: an optimiser that divides by the gradient's size would make full steps of mere
    rounding.

    Args:
        policy: what reads the views, with the weights that teach
        steering: what gives the coefficients
        lessons: what is scored
        num_scored: how many of each lesson's first tokens are; all others are left at 0
        budget: tokens in flight at most; memory does not grow with the number of views

    Returns:
        Two fp32 tensors, a row for each of the first `num_learned` tokens of every lesson.
    """
    suffixes = [lesson.token_ids[:count] for lesson, count in zip(lessons, num_scored, strict=True)]
    users: dict[tuple[int, ...], list[tuple[int, float, float]]] = defaultdict(list)
    plain: list[tuple[int, float, float]] = []
    for index, lesson in enumerate(lessons):
        if not suffixes[index]:
            continue
        views = lesson.views or (View(role="plain", prefix_ids=lesson.prompt_ids),)
        coefficients = steering.coefficients([view.role for view in views])
        for view, to_anchor, to_direction in zip(views, *coefficients, strict=True):
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
        pieces = _after_prompts(policy, lessons).split(lengths)
        for use in plain:
            add(pieces[use[0]], *use)
    for prefixes in budgeted(sorted(users, key=len), cost, budget):
        uses = [use for prefix in prefixes for use in users[prefix]]
        owners = [owner for owner, prefix in enumerate(prefixes) for _ in users[prefix]]
        states = policy.hidden(prefixes, [suffixes[index] for index, _, _ in uses], owners)
        for piece, use in zip(states.split([len(suffixes[index]) for index, _, _ in uses]), uses, strict=True):
            add(piece, *use)
    return anchor, direction


@timed("student")
def student_states(policy: Policy, lessons: Sequence[Lesson]) -> Float[Tensor, "tokens hidden"]:
    """Returns states of the learned tokens after the student's own prompts: its own pass and the plain view."""
    return _after_prompts(policy, lessons)


def _after_prompts(policy: Policy, lessons: Sequence[Lesson]) -> Tensor:
    prompts = list(dict.fromkeys(lesson.prompt_ids for lesson in lessons))
    owners = [prompts.index(lesson.prompt_ids) for lesson in lessons]
    return policy.hidden(prompts, [lesson.token_ids[: lesson.num_learned] for lesson in lessons], owners)
