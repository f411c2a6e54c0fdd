"""Steerings: coefficients by hand, the sums they promise, and the distributions they stand for."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ogls.loss.steering import (
    BoundedSteering,
    OutcomeContrast,
    OutcomeSteering,
    Plain,
    PositiveMean,
    PositiveOnly,
    Steering,
    Unsteered,
)

ROLES = ["success", "plain", "failure", "success", "failure", "failure"]


def random_views(num: int, vocab: int = 7, hidden: int = 5) -> tuple[Tensor, Tensor]:
    """States of `num` views at 3 tokens [views, tokens, hidden] and a head [vocab, hidden]."""
    generator = torch.Generator().manual_seed(num)
    states = torch.randn(num, 3, hidden, generator=generator, dtype=torch.float64)
    return states, torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)


def combine(coefficients: tuple[float, ...], states: Tensor) -> Tensor:
    return torch.tensordot(torch.tensor(coefficients, dtype=states.dtype), states, dims=1)


def target_of(steering: Steering, roles: list[str], states: Tensor, step: int = 0) -> Tensor:
    anchor, direction = (combine(coefficients, states) for coefficients in steering.coefficients(roles))
    return anchor + steering.strength(anchor, direction, step, (torch.empty(0), None)) * direction


def test_coefficients_by_hand() -> None:
    third = float(Fraction(1, 3))
    assert Unsteered().coefficients(["plain", "success", "idea"]) == ((0, 0.5, 0.5), (0, 0, 0))
    assert Unsteered().coefficients(["plain", "a new role"]) == ((0, 1), (0, 0))
    assert Plain().coefficients(ROLES) == ((0, 1, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0))
    assert Plain().coefficients(["plain"]) == ((1,), (0,))
    assert PositiveMean().coefficients(ROLES) == ((0.5, 0, 0, 0.5, 0, 0), (0, 0, 0, 0, 0, 0))
    assert PositiveOnly().coefficients(ROLES) == ((0, 1, 0, 0, 0, 0), (0.5, -1, 0, 0.5, 0, 0))
    expected = (0, 1, 0, 0, 0, 0), (0.5, 0, -third, 0.5, -third, -third)
    assert OutcomeSteering().coefficients(ROLES) == expected
    assert BoundedSteering().coefficients(ROLES) == expected
    assert OutcomeContrast().coefficients(ROLES) == ((0, 0, third, 0, third, third), expected[1])


@settings(deadline=None)
@given(st.permutations(["plain", "success", "failure"]), st.lists(st.sampled_from(ROLES), max_size=9))
def test_anchor_sums_to_one_and_direction_to_zero(needed: list[str], more: list[str]) -> None:
    for steering in (Plain(), Unsteered(), PositiveMean(), PositiveOnly(), OutcomeSteering(), OutcomeContrast()):
        anchor, direction = steering.coefficients(needed + more)
        assert len(anchor) == len(direction) == len(needed + more)
        assert sum(anchor) == pytest.approx(1, abs=1e-12)
        assert sum(direction) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("steering", "roles", "missing"),
    [
        (Unsteered(), ["plain"], "other than 'plain', got roles \\['plain'\\]"),
        (Plain(), ["success"], "'plain', got roles \\['success'\\]"),
        (PositiveMean(), ["plain", "failure"], "'success', got"),
        (PositiveOnly(), ["success"], "'plain', got"),
        (PositiveOnly(), ["plain", "idea"], "'success', got"),
        (OutcomeSteering(), ["plain", "success"], "'failure', got"),
        (OutcomeSteering(), ["plain", "failure"], "'success', got"),
        (OutcomeSteering(), [], "'plain', got roles \\[\\]"),
    ],
)
def test_a_missing_role_is_named(steering: Steering, roles: list[str], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        steering.coefficients(roles)


@pytest.mark.parametrize("make", [PositiveOnly, OutcomeSteering])
def test_ramp(make: type) -> None:
    assert [make(alpha=3.0, ramp_steps=4).alpha_at(step) for step in (0, 1, 2, 4, 100)] == [0, 0.75, 1.5, 3, 3]
    assert make(alpha=3.0).alpha_at(0) == 3.0
    with pytest.raises(ValueError, match=r"steering.alpha must be in \[0, 1000\], got -1"):
        make(alpha=-1.0)
    with pytest.raises(ValueError, match=r"steering.alpha must be in .*, got nan"):
        make(alpha=float("nan"))
    with pytest.raises(ValueError, match=r"steering.ramp_steps must be in .*, got -2"):
        make(ramp_steps=-2)


def test_without_a_direction_there_is_no_strength() -> None:
    assert Plain().alpha_at(7) == Unsteered().alpha_at(7) == PositiveMean().alpha_at(7) == 0.0


def test_alpha_zero_is_bitwise_the_plain_view() -> None:
    states, _ = random_views(len(ROLES))
    for steering in (OutcomeSteering(alpha=0.0), PositiveOnly(alpha=0.0), OutcomeSteering(alpha=2.0, ramp_steps=5)):
        assert torch.equal(target_of(steering, ROLES, states), states[1])


def test_equal_pools_change_nothing() -> None:
    states, _ = random_views(len(ROLES))
    success, failure = [0, 3], [2, 4, 5]
    states[success], states[failure] = states[0].clone(), states[0].clone()
    torch.testing.assert_close(target_of(OutcomeSteering(alpha=3.0), ROLES, states), states[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_target_is_p0_times_the_ratio_of_geometric_means(alpha: float) -> None:
    states, weight = random_views(len(ROLES))
    p = (states @ weight.T).softmax(-1)
    ratio = (p[0] * p[3]) ** (1 / 2) / (p[2] * p[4] * p[5]) ** (1 / 3)
    expected = p[1] * ratio**alpha
    expected /= expected.sum(-1, keepdim=True)
    target = (target_of(OutcomeSteering(alpha=alpha), ROLES, states) @ weight.T).softmax(-1)
    torch.testing.assert_close(target, expected, rtol=1e-10, atol=1e-14)


def test_combined_states_give_the_combined_logits_also_with_a_bias() -> None:
    """One head for all views: sum_c a_c (W h_c + b) = W (sum_c a_c h_c) + b when the a_c sum to 1."""
    states, weight = random_views(len(ROLES))
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float64)
    steering = OutcomeSteering(alpha=1.7)
    anchor, direction = steering.coefficients(ROLES)
    separately = combine(tuple(a + 1.7 * d for a, d in zip(anchor, direction, strict=True)), states @ weight.T + bias)
    once = target_of(steering, ROLES, states) @ weight.T + bias
    torch.testing.assert_close(once, separately, rtol=0, atol=1e-12)


def test_three_tokens_by_hand() -> None:
    """Plain (1/3, 1/3, 1/3), success (1/2, 1/4, 1/4), failure (1/4, 1/2, 1/4), alpha 1: target ∝ (2, 1/2, 1)."""
    states = torch.tensor([[[1 / 3, 1 / 3, 1 / 3]], [[1 / 2, 1 / 4, 1 / 4]], [[1 / 4, 1 / 2, 1 / 4]]]).double().log()
    target = target_of(OutcomeSteering(alpha=1.0), ["plain", "success", "failure"], states).softmax(-1)
    torch.testing.assert_close(target, torch.tensor([[4 / 7, 1 / 7, 2 / 7]]).double(), rtol=1e-6, atol=0)


def test_the_outcome_contrast_ends_at_the_success_mean() -> None:
    states, _ = random_views(len(ROLES))
    ends = target_of(OutcomeContrast(), ROLES, states)
    torch.testing.assert_close(ends, target_of(PositiveMean(), ROLES, states), rtol=0, atol=1e-12)


def test_a_bound_holds_at_every_token_and_a_wide_one_is_outcome_steering() -> None:
    states, weight = random_views(len(ROLES))
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float64)
    steering = BoundedSteering(epsilon=0.05, alpha_max=3.0, ramp_steps=4)
    anchor, direction = (combine(coefficients, states) for coefficients in steering.coefficients(ROLES))
    alpha = steering.strength(anchor, direction, 4, (weight, bias))
    assert alpha.shape == (3, 1)
    log_p0 = (anchor @ weight.T + bias).log_softmax(-1)
    log_p = ((anchor + alpha * direction) @ weight.T + bias).log_softmax(-1)
    assert ((log_p.exp() * (log_p - log_p0)).sum(-1) <= 0.05 + 1e-12).all()
    assert (steering.strength(anchor, direction, 0, (weight, bias)) == 0).all()
    wide = BoundedSteering(epsilon=1e6, alpha_max=3.0)
    assert (wide.strength(anchor, direction, 0, (weight, bias)) == 3).all()
    with pytest.raises(ValueError, match=r"BoundedSteering.epsilon must be in \(0, 1e6\], got 0"):
        BoundedSteering(epsilon=0.0)
