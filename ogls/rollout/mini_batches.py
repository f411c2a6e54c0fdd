"""A batch of rollouts is divided into mini-batches, each of which makes an optimiser step of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ogls.lessons.build import counted
from ogls.records import Batch, Lesson, RolloutGroup
from ogls.rollout.accuracy import summarise


def divided(batch: Batch, parts: int, passes: int = 1) -> list[Batch]:
    """Returns `parts` batches with equally many groups each, in their order, and the lessons that come from them.

    A lesson belongs to the group of its problem. What was measured of the whole batch, such as the time of sampling, is
    in the first part alone; what follows from a part's own groups and lessons, in each.

    Args:
        batch: what was sampled at once
        parts: number of parts
        passes: number of times that all parts follow one another
    """
    if parts == passes == 1:
        return [batch]
    refilled = "train/groups_refilled" in batch.metrics  # rates are of the first draw, whose groups are gone
    count, made, waiting = len(batch.groups), list[Batch](), list(batch.lessons)
    for part in range(parts):
        groups = batch.groups[part * count // parts : (part + 1) * count // parts]
        lessons: list[Lesson] = []
        for group in groups:  # lessons stand in the order of their groups
            while waiting and waiting[0].problem_id == group.problem.id:
                lessons.append(waiting.pop(0))
        own = _measured(lessons) | ({} if refilled else _rates(groups))
        made.append(replace(batch, lessons=tuple(lessons), groups=groups, metrics=own, phases=()))
    assert not waiting, f"{len(waiting)} lessons of no group"
    first = replace(made[0], metrics=batch.metrics | made[0].metrics, phases=batch.phases)
    return [first, *made[1:], *made * (passes - 1)]


def _rates(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    return {f"train/{name}": value for name, value in summarise(groups).items()}


def _measured(lessons: Sequence[Lesson]) -> dict[str, float]:
    return {f"train/{name}": value for name, value in counted(lessons).items()}
