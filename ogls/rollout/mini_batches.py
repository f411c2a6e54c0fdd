"""A batch of rollouts is divided into mini-batches, each of which makes an optimiser step of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ogls.lessons.build import counted
from ogls.records import Batch, Lesson, RolloutGroup
from ogls.rollout.accuracy import summarise


def divided(batch: Batch, parts: int) -> list[Batch]:
    """Returns `parts` batches with equally many groups each, in their order, and the lessons that come from them.

    A lesson belongs to the group of its problem. What was measured of the whole batch is in the first part alone, and
    times, such as that of sampling, are 0 in the others: without them Lightning would log the first part's again. What
    follows from a part's own groups and lessons is in each.
    """
    if parts == 1:
        return [batch]
    refilled = "train/groups_refilled" in batch.metrics  # rates are of the first draw, whose groups are gone
    count, made, waiting = len(batch.groups), [], list(batch.lessons)
    for part in range(parts):
        groups = batch.groups[part * count // parts : (part + 1) * count // parts]
        lessons: list[Lesson] = []
        for group in groups:  # lessons stand in the order of their groups
            while waiting and waiting[0].problem_id == group.problem.id:
                lessons.append(waiting.pop(0))
        metrics = batch.metrics if part == 0 else {name: 0.0 for name in batch.metrics if name.startswith("time/")}
        made.append(
            replace(
                batch,
                lessons=tuple(lessons),
                groups=groups,
                metrics=metrics | _measured(lessons) | ({} if refilled else _rates(groups)),
                phases=batch.phases if part == 0 else (),
            )
        )
    assert not waiting, f"{len(waiting)} lessons of no group"
    return made


def _rates(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    return {f"train/{name}": value for name, value in summarise(groups).items()}


def _measured(lessons: Sequence[Lesson]) -> dict[str, float]:
    return {f"train/{name}": value for name, value in counted(lessons).items()}
