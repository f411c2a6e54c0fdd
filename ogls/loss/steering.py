"""Steering: from what the teacher reads (views) to the distribution the student learns (target).

The head is linear, so a mean of logits is a mean of final-norm hidden states. A steering splits it into an anchor,
whose coefficients sum to 1, and a direction, whose coefficients sum to 0:

    target = softmax(W (anchor + alpha * direction) + b)

Kept apart, every alpha costs no further teacher pass. Formulas: OGLS-SD, arXiv 2605.12400, equations 4 to 16.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ogls.loss.alpha_bound import Head, largest_alpha
from ogls.records import Role
from ogls.system.step_metrics import timed

Coefficients = tuple[float, ...]


def mean_of(roles: Sequence[Role], *wanted: Role) -> Coefficients:
    """Coefficients of the mean over the views whose role is wanted. A mean over nothing is an error, never a zero."""
    chosen = [role in wanted for role in roles]
    if not any(chosen):
        needed = " or ".join(repr(role) for role in wanted) or "other than 'plain'"
        raise ValueError(f"the steering needs a view of role {needed}, got roles {list(roles)}")
    return tuple(float(c) / sum(chosen) for c in chosen)


def difference(left: Coefficients, right: Coefficients) -> Coefficients:
    return tuple(a - b for a, b in zip(left, right, strict=True))


def check_ramp(alpha: float, ramp_steps: int) -> None:
    if not 0.0 <= alpha < math.inf:
        raise ValueError(f"steering needs a finite alpha >= 0, got alpha={alpha}")
    if ramp_steps < 0:
        raise ValueError(f"steering needs ramp_steps >= 0, got ramp_steps={ramp_steps}")


def ramp(alpha: float, ramp_steps: int, step: int) -> float:
    """Linear from 0 at step 0 to alpha at step `ramp_steps`; the first step of a ramp trains towards the plain view."""
    return alpha * min(1.0, step / ramp_steps) if ramp_steps else alpha


@dataclass(frozen=True, kw_only=True)
class Steered:
    """A target in its parts: softmax(W (anchor + alpha * direction) + b)."""

    anchor: Float[Tensor, "tokens hidden"]
    direction: Float[Tensor, "tokens hidden"]
    alpha: float | Float[Tensor, "tokens 1"]

    @property
    def states(self) -> Float[Tensor, "tokens hidden"]:
        """The states of the target."""
        return self.anchor + self.alpha * self.direction


class Steering(ABC):
    """A steering makes a target out of the views of one lesson, as coefficients of their states."""

    @abstractmethod
    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        """Returns (anchor, direction): one coefficient per view each; a view that is zero in both is not scored.

        Raises:
            ValueError: a role that it needs is not among `roles`; the message names it.
        """

    def alpha_at(self, step: int) -> float:
        """Returns the strength alpha at an optimiser step; 0 for a steering without a direction."""
        return 0.0

    def strength(self, anchor: Tensor, direction: Tensor, step: int, head: Head) -> float | Tensor:
        """Returns alpha, one for all tokens or one per token [tokens, 1].

        Args:
            anchor: states [tokens, hidden] before steering
            direction: states [tokens, hidden] to steer along
            step: number of updates so far
            head: weight and bias of the output head, for a steering that looks at the distributions themselves
        """
        return self.alpha_at(step)


@dataclass(frozen=True)
class Plain(Steering):
    """The target is what the teacher says who reads the problem alone: a reference, and no privilege."""

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        return mean_of(roles, "plain"), (0.0,) * len(roles)


@dataclass(frozen=True)
class Unsteered(Steering):
    """The privileged teacher as it is: the mean of all views but the plain one (of one view in OPSD, SDPO, ROSD)."""

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        return mean_of(roles, *dict.fromkeys(role for role in roles if role != "plain")), (0.0,) * len(roles)


@dataclass(frozen=True)
class PositiveMean(Steering):
    """Positive Mean Teacher, an ablation of OGLS-SD: the mean of the success views."""

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        return mean_of(roles, "success"), (0.0,) * len(roles)


@dataclass(frozen=True)
class PositiveOnly(Steering):
    """Positive-Only Steering, an ablation of OGLS-SD: plain + alpha (success mean - plain).

    alpha rises linearly from 0 over `ramp_steps` optimiser steps and stays; 0 steps make it constant.
    """

    alpha: float = 1.0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        check_ramp(self.alpha, self.ramp_steps)

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        plain = mean_of(roles, "plain")
        return plain, difference(mean_of(roles, "success"), plain)

    def alpha_at(self, step: int) -> float:
        return ramp(self.alpha, self.ramp_steps, step)


@dataclass(frozen=True)
class OutcomeSteering(Steering):
    """OGLS-SD: plain + alpha (success mean - failure mean); target ∝ p0 (GM(p+) / GM(p-))^alpha.

    What the template itself does to the logits is the same in both pools and cancels in the difference. alpha rises
    linearly from 0 over `ramp_steps` optimiser steps and stays; 0 steps make it constant.
    """

    alpha: float = 1.0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        check_ramp(self.alpha, self.ramp_steps)

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        return mean_of(roles, "plain"), difference(mean_of(roles, "success"), mean_of(roles, "failure"))

    def alpha_at(self, step: int) -> float:
        return ramp(self.alpha, self.ramp_steps, step)


@dataclass(frozen=True)
class OutcomeContrast(Steering):
    """From the failure mean to the success mean, without the plain view.

    For objectives that look at target and anchor of the same token: log p_target - log p_anchor is the contrast of
    RLCSD (arXiv 2606.11709). As a target for distillation it is `PositiveMean`.
    """

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        failure = mean_of(roles, "failure")
        return failure, difference(mean_of(roles, "success"), failure)

    def alpha_at(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class BoundedSteering(Steering):
    """OGLS-SD with a bound instead of a guess: the largest alpha <= alpha_max with KL(target || p0) <= epsilon.

    Each token has its own. p0 is the plain view's distribution at temperature 1. The target ∝ p0 exp(alpha Delta) is an
    exponential family, so the KL grows with alpha and bisection finds the bound (`ogls.loss.alpha_bound`). alpha_max
    rises linearly from 0 over `ramp_steps` optimiser steps. The metric `alpha` is the mean over tokens.
    """

    epsilon: float = 0.1
    alpha_max: float = 3.0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        check_ramp(self.alpha_max, self.ramp_steps)
        if not self.epsilon > 0.0:
            raise ValueError(f"BoundedSteering needs epsilon > 0, got epsilon={self.epsilon}")

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        return OutcomeSteering().coefficients(roles)

    def alpha_at(self, step: int) -> float:
        """The largest alpha that a token can have."""
        return ramp(self.alpha_max, self.ramp_steps, step)

    @timed("teacher")
    def strength(self, anchor: Tensor, direction: Tensor, step: int, head: Head) -> Tensor:
        return largest_alpha(anchor, direction, head, self.alpha_at(step), self.epsilon)[:, None]
