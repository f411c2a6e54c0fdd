"""A steering makes one target distribution out of all the teacher's views.

A *view* is what the teacher reads before the tokens of a rollout: the problem alone (plain), or the problem with a
privileged text. The output head is linear, so a mean of the views' logits is a mean of their final-norm hidden states.
A steering makes two sums of these states: an anchor, whose coefficients sum to 1, and a direction, whose coefficients
sum to 0. alpha is the strength of the steering:

    target = softmax(W (anchor + alpha * direction) + b)

Since the two are kept apart, another alpha costs no further pass of the teacher. In the formulas z0 are the plain
view's logits, and zbar+ and zbar- the means of the logits of success and failure views. Source: OGLS-SD, arXiv
2605.12400, equations 4 to 16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ogls.loss.alpha_bound import largest_alpha
from ogls.loss.chunked import Head
from ogls.records import Role
from ogls.system.ranges import POSITIVE, STRENGTH, check, within
from ogls.system.step_metrics import timed

Coefficients = tuple[float, ...]
"""One number per view."""


def mean_of(roles: Sequence[Role], *wanted: Role) -> Coefficients:
    """Returns the coefficients of the mean over the views whose role is wanted.

    Raises:
        ValueError: no view has a wanted role; a mean over nothing is an error, never a zero.
    """
    chosen = [role in wanted for role in roles]
    if not any(chosen):
        needed = " or ".join(repr(role) for role in wanted) or "other than 'plain'"
        raise ValueError(f"the steering needs a view of role {needed}, got roles {list(roles)}")
    return tuple(float(c) / sum(chosen) for c in chosen)


def difference(left: Coefficients, right: Coefficients) -> Coefficients:
    """Returns left - right, view by view."""
    return tuple(a - b for a, b in zip(left, right, strict=True))


def check_ramp(alpha: float, ramp_steps: int) -> None:
    """Raises ValueError unless alpha is a strength and the ramp a number of steps."""
    within("steering.alpha", alpha, STRENGTH)
    within("steering.ramp_steps", ramp_steps, "[0, 1e9]")


def ramp(alpha: float, ramp_steps: int, step: int) -> float:
    """Returns the strength at a step: it rises linearly from 0 at step 0 to alpha at step `ramp_steps`, and stays.

    The first step of a rise trains towards the anchor. With 0 `ramp_steps` the strength is always alpha.
    """
    return alpha * min(1.0, step / ramp_steps) if ramp_steps else alpha


@dataclass(frozen=True, kw_only=True)
class Steered:
    """A steered target is kept in its parts: softmax(W (anchor + alpha * direction) + b).

    Args:
        anchor: states before steering
        direction: states to steer along
        alpha: strength of the steering, one for all tokens or one per token
        head: weight and bias of the head of the model whose states these are; None for the student's own
    """

    anchor: Float[Tensor, "tokens hidden"]
    direction: Float[Tensor, "tokens hidden"]
    alpha: float | Float[Tensor, "tokens 1"]
    head: Head | None = None

    @property
    def states(self) -> Float[Tensor, "tokens hidden"]:
        """Returns the states of the target."""
        return self.anchor + self.alpha * self.direction


class Steering(ABC):
    """A steering makes a target of the views of one lesson, by coefficients of their states."""

    @abstractmethod
    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        """Returns the coefficients of the anchor and those of the direction, one per view each.

        The teacher does not read a view whose two coefficients are 0.

        Args:
            roles: role of each view, such as ``plain``, ``success`` or ``failure``

        Raises:
            ValueError: a role that the steering needs is missing; the message names it.
        """

    def alpha_at(self, step: int) -> float:
        """Returns the strength alpha at an optimiser step; 0 for a steering without a direction."""
        return 0.0

    def strength(
        self, anchor: Float[Tensor, "tokens hidden"], direction: Float[Tensor, "tokens hidden"], step: int, head: Head
    ) -> float | Float[Tensor, "tokens 1"]:
        """Returns alpha, one for all tokens or one per token.

        Args:
            anchor: states before steering
            direction: states to steer along
            step: number of updates so far
            head: weight and bias of the head of these states, for a steering that looks at the distributions themselves
        """
        return self.alpha_at(step)


@dataclass(frozen=True)
class Plain(Steering):
    """Plain takes the plain view alone: target = softmax(z0), a reference without privilege."""

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        return mean_of(roles, "plain"), (0.0,) * len(roles)


@dataclass(frozen=True)
class Unsteered(Steering):
    """Unsteered takes the privileged teacher as it is: the mean of all views but the plain one.

    In OPSD, SDPO and ROSD there is one such view.
    """

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        return mean_of(roles, *dict.fromkeys(role for role in roles if role != "plain")), (0.0,) * len(roles)


@dataclass(frozen=True)
class PositiveMean(Steering):
    """PositiveMean takes the mean zbar+ of the success views' logits: target = softmax(zbar+).

    This is OGLS-SD's ablation without a contrast, the Positive Mean Teacher.
    """

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        return mean_of(roles, "success"), (0.0,) * len(roles)


@dataclass(frozen=True)
class PositiveOnly(Steering):
    """PositiveOnly moves the plain view towards success: target = softmax(z0 + alpha (zbar+ - z0)).

    z0 are the plain view's logits, and zbar+ is the mean of the success views' logits. This is OGLS-SD's ablation
    without failures, Positive-Only Steering.

    Args:
        alpha: strength of the steering after its rise
        ramp_steps: number of optimiser steps over which the strength rises linearly from 0; 0 makes it constant
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
    """OutcomeSteering moves the plain view from failure to success: target = softmax(z0 + alpha (zbar+ - zbar-)).

    This is OGLS-SD's steering. z0 are the plain view's logits; zbar+ and zbar- are the means of the success and of the
    failure views' logits. In probabilities, target ∝ p0 (GM(p+) / GM(p-))^alpha with geometric means GM over the views.
    What the words of the prompt do to the logits is the same in both means, and cancels in the difference.

    Args:
        alpha: strength of the steering after its rise
        ramp_steps: number of optimiser steps over which the strength rises linearly from 0; 0 makes it constant
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
    """OutcomeContrast goes from the failure mean (anchor) to the success mean (target), without the plain view.

    It is for objectives that compare target and anchor of a token: log p_target - log p_anchor is the contrast of RLCSD
    (arXiv 2606.11709). As a target for distillation it equals `PositiveMean`.
    """

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        failure = mean_of(roles, "failure")
        return failure, difference(mean_of(roles, "success"), failure)

    def alpha_at(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class BoundedSteering(Steering):
    """BoundedSteering is `OutcomeSteering` with the largest alpha of each token that a KL budget allows.

        alpha_t = max {alpha <= alpha_max: KL(target_t(alpha) || p0_t) <= epsilon}        p0_t = softmax(z0_t)

    The target ∝ p0 exp(alpha Delta), Delta = zbar+ - zbar-, is an exponential family, so the KL grows with alpha and
    bisection finds the bound (`ogls.loss.alpha_bound`).

    Args:
        epsilon: KL budget of each token, in nats, at temperature 1
        alpha_max: upper bound of alpha after its rise
        ramp_steps: number of optimiser steps over which the upper bound rises linearly from 0; 0 makes it constant
    """

    epsilon: float = 0.1
    alpha_max: float = 3.0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        check_ramp(self.alpha_max, self.ramp_steps)
        check(self, {"epsilon": POSITIVE})

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        return OutcomeSteering().coefficients(roles)

    def alpha_at(self, step: int) -> float:
        """Returns the largest alpha that a token can have at an optimiser step."""
        return ramp(self.alpha_max, self.ramp_steps, step)

    @timed("teacher")
    def strength(
        self, anchor: Float[Tensor, "tokens hidden"], direction: Float[Tensor, "tokens hidden"], step: int, head: Head
    ) -> Float[Tensor, "tokens 1"]:
        return largest_alpha(anchor, direction, head, self.alpha_at(step), self.epsilon)[:, None]
