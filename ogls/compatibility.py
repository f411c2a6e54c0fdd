"""Do the parts of a configuration fit together? Asked before any weights are loaded; an error says what does not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ogls.data import RolloutDataModule
    from ogls.loss.objective import Objective
    from ogls.loss.steering import Steering


def check_data(data: RolloutDataModule) -> None:
    """Counts, and what privilege and selection need of the text half."""
    for name in ("group_size", "problems_per_step", "steps_per_epoch", "updates_per_rollout", "grading_workers"):
        if getattr(data, name) < 1:
            raise ValueError(f"data.{name} must be at least 1, got {getattr(data, name)}")
    reader, needed = type(data.privilege).__name__, data.privilege.min_group_size
    if data.group_size < needed:
        raise ValueError(
            f"{reader} contrasts rollouts of one group: data.group_size must be at least {needed}, "
            f"got {data.group_size}"
        )
    if data.privilege.needs_reflector and data.reflector is None:
        raise ValueError(f"{reader} reads reflections: set data.reflector")
    if data.selection.needs_error and data.locator is None and data.reflector is None:
        raise ValueError(f"{type(data.selection).__name__} needs an error locator: set data.locator")
    if data.privilege.samples_rollouts and data.engine is None:
        raise ValueError(f"{reader} learns from rollouts: set data.engine")


def check_method(objective: Objective, steering: Steering, data: RolloutDataModule) -> None:
    """Privilege, steering and objective: what one needs, another has to give, and nothing is given in vain."""
    if data.one_step_off:
        _check_one_step_off(data)
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
    for _, term in objective.terms:
        if term.corrects_staleness and not data.sampling.is_softmax_at(term.temperature):
            drawn = f"temperature {data.sampling.temperature}, top_p {data.sampling.top_p}, top_k {data.sampling.top_k}"
            raise ValueError(
                f"{type(term).__name__} takes ratios to the sampler's probabilities at temperature {term.temperature}: "
                f"expected that in data.sampling, with top_p 1 and top_k 0, got {drawn}"
            )
    if data.max_staleness and not objective.corrects_staleness:
        cause = "one_step_off" if data.one_step_off else "updates_per_rollout"
        raise ValueError(
            f"data.{cause} is {getattr(data, cause)}, so rollouts are off-policy: set model.objective.importance_cap"
        )


def _check_one_step_off(data: RolloutDataModule) -> None:
    if data.updates_per_rollout > 1:
        raise ValueError(
            f"data.one_step_off makes every batch anew: data.updates_per_rollout is {data.updates_per_rollout}"
        )
    if data.ranks.size > 1:
        raise ValueError(f"data.one_step_off is for one device, got {data.ranks.size}")
    if not data.privilege.samples_rollouts:
        raise ValueError(f"{type(data.privilege).__name__} samples nothing ahead: set data.one_step_off to false")
    if data.reflector is not None and data.reflector.needs_start_weights:
        raise ValueError("data.one_step_off samples from one version at a time: set data.reflector.weights to student")


def check_monitors(monitors: Iterable[str | None], samples: int) -> None:
    """A checkpoint can wait only for what a validation with `samples` rollouts a problem gives."""
    for monitor in monitors:
        asked = re.fullmatch(r"val\w*/(avg|pass|maj)_at_(\d+)", monitor or "")
        if asked and (int(asked[2]) > samples or (asked[1] == "avg" and int(asked[2]) != samples)):
            raise ValueError(
                f"a checkpoint waits for {asked[0]}, but data.evaluation.samples is {samples}: "
                f"expected val/avg_at_{samples}"
            )
