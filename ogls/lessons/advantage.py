"""Advantages of rollouts: how much better each did than its group, for objectives that reinforce."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ogls.records import RolloutGroup


class Advantage(ABC):
    """Groups in, one number a rollout out.

    `routed` says what becomes of a rollout that also has privileged views: it keeps its advantage beside them, or,
    routed, it is left to distillation and only the others are reinforced (SRPO, arXiv 2604.02288).
    """

    routed: bool

    @abstractmethod
    def of(self, group: RolloutGroup) -> tuple[float, ...]:
        """Advantages of the group's rollouts; 0 for one that is not reinforced."""


@dataclass(frozen=True)
class GroupRelative(Advantage):
    """GRPO (arXiv 2402.03300, section 4.1.2): A_i = (r_i - mean r) / std r, with r_i = 1 for a right rollout, else 0.

    std is the population's, never 0 in a mixed group. Other groups give no advantage, and so cost no pass.

    Args:
        std: divide by it, as published. Without, easy and hard problems weigh less than those solved half of the time
            (Dr. GRPO, arXiv 2503.20783).
        routed: leave rollouts with privileged views to distillation.
    """

    std: bool = True
    routed: bool = False

    def of(self, group: RolloutGroup) -> tuple[float, ...]:
        if not group.mixed:
            return (0.0,) * len(group.rollouts)
        mean = len(group.successes) / len(group.rollouts)
        scale = (mean * (1 - mean)) ** 0.5 if self.std else 1.0
        return tuple((float(rollout.correct) - mean) / scale for rollout in group.rollouts)
