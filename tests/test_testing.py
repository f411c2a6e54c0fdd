"""The checks for users' own classes find what they are there to find, and pass all that is built in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import ogls.methods  # noqa: F401  variants bring steerings along
from ogls.loss.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL, SkewKL
from ogls.loss.steering import (
    BoundedSteering,
    Coefficients,
    OutcomeContrast,
    OutcomeSteering,
    Plain,
    PositiveMean,
    PositiveOnly,
    Steering,
    Unsteered,
)
from ogls.methods.opsd_ectr import ContrastGuidance
from ogls.testing import check_divergence, check_steering

DIVERGENCES = [ForwardKL(), ReverseKL(), JensenShannon(), JensenShannon(0.05), SkewKL(), SkewKL(0.0), SkewKL(0.9)]
STEERINGS = [
    *(Plain(), Unsteered(), PositiveMean(), PositiveOnly(2.0, 10), OutcomeSteering(3.0, 100), OutcomeContrast()),
    *(BoundedSteering(ramp_steps=5), ContrastGuidance()),
]
ROLES = [["plain", "success", "failure"], ["plain", "success", "success", "failure", "failure", "failure"]]


def built_in(kind: type) -> set[type]:
    return {c for c in kind.__subclasses__() if c.__module__.startswith("ogls.")}


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("vocab", [2, 13, 101])
def test_built_in_divergences_pass(divergence: Divergence, seed: int, vocab: int) -> None:
    check_divergence(divergence, vocab=vocab, seed=seed)


@pytest.mark.parametrize("roles", ROLES, ids=len)
@pytest.mark.parametrize("steering", STEERINGS, ids=str)
def test_built_in_steerings_pass(steering: Steering, roles: list[str]) -> None:
    check_steering(steering, roles)


def test_nothing_built_in_is_forgotten() -> None:
    assert {type(divergence) for divergence in DIVERGENCES} == built_in(Divergence)
    assert {type(steering) for steering in STEERINGS} == built_in(Steering)


Terms = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Made(Divergence):
    def __init__(self, terms: Terms) -> None:
        self.made = terms

    def terms(self, ps: Tensor, pt: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.made(ps, pt, u)


def with_positions(ps: Tensor, pt: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(1, ps.shape[-1] + 1, dtype=ps.dtype)
    return place * (pt * u - pt + ps), place * (ps - pt)


WRONG: dict[str, tuple[Terms, str]] = {
    "factor": (lambda ps, pt, u: (pt * u, -2 * pt), r"ph is not p_S ds/dp_S: got"),
    "other direction": (lambda ps, pt, u: (-ps * u, -pt), r"ph is not p_S ds/dp_S: got"),
    "constant": (lambda ps, pt, u: (-ps * u, -ps * u), r"ph is not p_S ds/dp_S; it misses the constant 1 of"),
    "constant -1": (lambda ps, pt, u: (pt * u, ps - pt), r"it misses the constant -1 of ds/dp_S"),
    "negative": (lambda ps, pt, u: (-pt * u, pt.clone()), "is below 0: -"),
    "not 0": (lambda ps, pt, u: (pt * (u + 0.1), -pt), "of equal distributions is not 0: 0.1"),
    "places": (with_positions, "summands depend on the order of the vocabulary"),
    "overflow": (lambda ps, pt, u: (ps * u.expm1() ** 2, -ps * u.expm1() * (u.expm1() + 2)), "summands are not finite"),
    "detached": (lambda ps, pt, u: ((pt * u).detach(), -pt), "do not depend on the student, or are detached"),
    "shape": (lambda ps, pt, u: ((pt * u).sum(-1), -pt), r"summands of shape \[4\], not \[4, 13\]"),
    "in place": (lambda ps, pt, u: (pt * u, pt.neg_()), "changes its argument pt"),
    "alias": (lambda ps, pt, u: (pt * u, u), "ph are no new tensor"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_divergence_is_found(fault: str) -> None:
    terms, complaint = WRONG[fault]
    with pytest.raises(AssertionError, match=complaint):
        check_divergence(Made(terms))


def test_a_cross_entropy_is_sound_but_no_divergence() -> None:
    made = Made(lambda ps, pt, u: (pt * (u - torch.special.xlogy(1.0, pt).clamp(min=-1e4)), -pt))
    check_divergence(made, proper=False)
    with pytest.raises(AssertionError, match="of equal distributions is not 0"):
        check_divergence(made)


class Fixed(Steering):
    def __init__(self, anchor: Coefficients, direction: Coefficients, alpha: float = 1.0) -> None:
        self.parts, self.alpha = (anchor, direction), alpha

    def coefficients(self, roles: Sequence[str]) -> tuple[Coefficients, Coefficients]:
        return self.parts

    def alpha_at(self, step: int) -> float:
        return self.alpha if step else 0.0


@pytest.mark.parametrize(
    ("steering", "complaint"),
    [
        (Fixed((0.5, 0.0, 0.4), (0.0, 1.0, -1.0)), "the anchor's coefficients sum to 0.9, expected 1"),
        (Fixed((1.0, 0.0, 0.0), (0.0, 1.0, -0.5)), "the direction's coefficients sum to 0.5, expected 0"),
        (Fixed((1.0, 0.0), (0.0, 1.0, -1.0)), "the anchor needs one coefficient per role, got 2 for"),
        (Fixed((1.0, 0.0, 0.0), (0.0, 0.0)), "the direction needs one coefficient per role, got 2 for"),
        (Fixed((1.0, 0.0, 0.0), (0.0, 1.0, -1.0), -0.1), r"alpha_at\(1\) is -0.1"),
        (Fixed((1.0, 0.0, 0.0), (0.0, 1.0, -1.0), float("inf")), r"alpha_at\(1\) is inf"),
        (Fixed((1.0, 0.0, 0.0), (0.0, 1.0, -1.0), float("nan")), r"alpha_at\(1\) is nan"),
        (Fixed((float("nan"), 0.0, 0.0), (0.0, 1.0, -1.0)), "the anchor's coefficients sum to nan"),
    ],
)
def test_a_wrong_steering_is_found(steering: Steering, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_steering(steering, ROLES[0])


def test_a_role_that_is_not_there_is_the_steerings_own_complaint() -> None:
    with pytest.raises(ValueError, match="needs a view of role 'failure'"):
        check_steering(OutcomeSteering(), ["plain", "success"])
