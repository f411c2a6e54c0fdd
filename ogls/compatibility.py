"""Do the parts of a configuration fit together? Asked before any weights are loaded; an error says what does not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ogls.data import RolloutDataModule
    from ogls.objective import Objective
    from ogls.steering import Steering


def check_method(objective: Objective, steering: Steering, data: RolloutDataModule) -> None:
    """Privilege, steering and objective: what one needs, another has to give, and nothing is given in vain."""
    learner, reader = type(objective).__name__, type(data.privilege).__name__
    roles = sorted(data.privilege.roles)
    if objective.needs_teacher:
        try:
            steering.mixture(["plain", *roles])
        except ValueError as error:
            names = f"{type(steering).__name__} and {reader}"
            raise ValueError(f"model.steering and data.privilege do not fit, {names}: {error}") from error
        if not data.privilege.samples_rollouts:
            raise ValueError(f"{reader} gives no views to distil from: set model.objective")
    elif roles:
        raise ValueError(f"{reader} gives views of role {roles}, but {learner} needs no teacher: set data.privilege")
    if objective.needs_advantage != (data.advantage is not None):
        needs = "needs" if objective.needs_advantage else "makes no use of"
        raise ValueError(f"{learner} {needs} advantages: set data.advantage")
    if data.updates_per_rollout > 1 and not objective.corrects_staleness:
        raise ValueError(
            f"data.updates_per_rollout is {data.updates_per_rollout}, so rollouts are off-policy: "
            "set model.objective.importance_cap"
        )


def check_monitors(monitors: Iterable[str | None], samples: int) -> None:
    """A checkpoint can wait only for what a validation with `samples` rollouts a problem gives."""
    for monitor in monitors:
        asked = re.fullmatch(r"val\w*/(avg|pass|maj)_at_(\d+)", monitor or "")
        if asked and (int(asked[2]) > samples or (asked[1] == "avg" and int(asked[2]) != samples)):
            raise ValueError(
                f"a checkpoint waits for {asked[0]}, but data.evaluation.samples is {samples}: "
                f"expected val/avg_at_{samples}"
            )
