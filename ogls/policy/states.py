"""Student and teacher states are made here, each distinct view in one pass.

Rollouts that have a view in common share its pass, and only weighted sums over views are kept.
"""

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
    """Returns anchor and direction of the target for the learned tokens of every lesson, in fp32.

        anchor_t = sum_c a_c h_c,t        direction_t = sum_c d_c h_c,t

    The sums run over the views c, with coefficients a and d of the steering; h_c,t is the final-norm hidden state that
    predicts token t under view c. A view whose two coefficients are 0 is not run. A lesson without views has the plain
    one. The plain view is laid out exactly as the student's own pass (`student_states`), so that equal weights give
    equal states to the last bit, and a loss of exactly 0 at alpha = 0: an optimiser that divides by the gradient's size
    would make full steps of mere rounding.

    Args:
        policy: model that reads the views, with the teacher's weights
        steering: source of the coefficients
        lessons: lessons whose tokens are read
        num_scored: how many of each lesson's first tokens are read; the states of all others are 0
        budget: view and lesson tokens in one pass; memory does not grow with the number of views
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

    for uses in policy.in_step([plain] if plain else []):
        states = _after_prompts(policy, lessons if uses else ())
        for use in uses:
            add(states.split(lengths)[use[0]], *use)
    for prefixes in policy.in_step(budgeted(sorted(users, key=len), cost, budget)):
        if not prefixes:
            policy.idle()
            continue
        uses = [use for prefix in prefixes for use in users[prefix]]
        owners = [owner for owner, prefix in enumerate(prefixes) for _ in users[prefix]]
        states = policy.hidden(prefixes, [suffixes[index] for index, _, _ in uses], owners)
        for piece, use in zip(states.split([len(suffixes[index]) for index, _, _ in uses]), uses, strict=True):
            add(piece, *use)
    return anchor, direction


@timed("student")
def student_states(policy: Policy, lessons: Sequence[Lesson]) -> Float[Tensor, "tokens hidden"]:
    """Returns the final-norm states that predict the learned tokens of every lesson after the student's own prompt."""
    return _after_prompts(policy, lessons)


def _after_prompts(policy: Policy, lessons: Sequence[Lesson]) -> Tensor:
    if not lessons:
        return policy.idle()
    prompts = list(dict.fromkeys(lesson.prompt_ids for lesson in lessons))
    owners = [prompts.index(lesson.prompt_ids) for lesson in lessons]
    return policy.hidden(prompts, [lesson.token_ids[: lesson.num_learned] for lesson in lessons], owners)
