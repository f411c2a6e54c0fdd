"""Advantages say how much better each rollout did than its group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ogls.records import RolloutGroup


class Advantage(ABC):
    """An advantage gives every rollout of a group the number by which it is reinforced.

    A rollout that also has privileged views keeps its advantage beside them. If `routed` is true, it is left to
    distillation instead, and only the other rollouts are reinforced (SRPO, arXiv 2604.02288).
    """

    routed: bool

    @abstractmethod
    def of(self, group: RolloutGroup) -> tuple[float, ...]:
        """Returns one advantage per rollout of the group; 0 for a rollout that is not reinforced."""


@dataclass(frozen=True)
class GroupRelative(Advantage):
    """Each rollout is compared with the mean of its group, as in GRPO (arXiv 2402.03300, section 4.1.2).

        A_i = (r_i - mean r) / std r        with r_i = 1 for a right rollout, else 0

    std is the standard deviation of the group itself, which is never 0 where both outcomes occur. In all other groups
    every advantage is 0, and the model does not have to read their rollouts.

    Args:
        std: whether to divide by the group's standard deviation, as published. Without it, easy and hard problems weigh
            less than those that are solved half of the time (Dr. GRPO, arXiv 2503.20783).
        routed: whether rollouts with privileged views are left to distillation instead
    """

    std: bool = True
    routed: bool = False

    def of(self, group: RolloutGroup) -> tuple[float, ...]:
        if not group.mixed:
            return (0.0,) * len(group.rollouts)
        mean = len(group.successes) / len(group.rollouts)
        scale = (mean * (1 - mean)) ** 0.5 if self.std else 1.0
        return tuple((float(rollout.correct) - mean) / scale for rollout in group.rollouts)
