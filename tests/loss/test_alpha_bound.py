"""The exponential family of targets: its derivative, Hoeffding's bound, and the largest alpha within a KL budget."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ogls.loss import tiles as blocking
from ogls.loss.alpha_bound import largest_alpha, tilted_kl
from ogls.loss.diagnostics import diagnostics

V, H = 11, 6


def family(seed: int, tokens: int = 5, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchor and direction states, head weight and bias; Delta grows with `scale`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(tokens, H), scale * normal(tokens, H), normal(V, H), normal(V)


def kl_to_p0(anchor: Tensor, direction: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
    """By definition: sum p log(p / p0)."""
    p0 = (anchor @ weight.T + bias).softmax(-1)
    p = (anchor @ weight.T + bias + alpha[:, None] * (direction @ weight.T)).softmax(-1)
    return (p * (p / p0).log()).sum(-1)


seeds = st.integers(0, 10_000)
scales = st.floats(0.01, 2.0)


@settings(deadline=None, max_examples=30)
@given(seeds, scales, st.floats(0.0, 3.0))
def test_the_kl_grows_by_alpha_times_the_variance_and_stays_under_hoeffdings_bound(
    seed: int, scale: float, alpha: float
) -> None:
    anchor, direction, weight, bias = family(seed, scale=scale)
    log_p0, delta = (anchor @ weight.T + bias).log_softmax(-1), direction @ weight.T
    alphas = torch.full((len(anchor),), alpha, dtype=torch.float64, requires_grad=True)
    kl = tilted_kl(log_p0, delta, alphas)
    torch.testing.assert_close(kl, kl_to_p0(anchor, direction, weight, bias, alphas), rtol=1e-9, atol=1e-11)
    (slope,) = torch.autograd.grad(kl.sum(), alphas)
    p = (log_p0 + alpha * delta).softmax(-1)
    variance = (p * delta**2).sum(-1) - (p * delta).sum(-1) ** 2
    torch.testing.assert_close(slope, alpha * variance, rtol=1e-7, atol=1e-9)
    spread = delta.amax(-1) - delta.amin(-1)
    assert (kl <= alpha**2 * spread**2 / 8 + 1e-12).all()


@settings(deadline=None, max_examples=30)
@given(seeds, scales, st.floats(1e-4, 2.0), st.floats(0.1, 5.0))
def test_the_largest_alpha_keeps_the_budget_and_leaves_nothing_of_it(
    seed: int, scale: float, epsilon: float, alpha_max: float
) -> None:
    anchor, direction, weight, bias = family(seed, scale=scale)
    alpha = largest_alpha(anchor, direction, (weight, bias), alpha_max, epsilon)
    assert (alpha >= 0).all()
    assert (alpha <= alpha_max).all()
    assert (kl_to_p0(anchor, direction, weight, bias, alpha) <= epsilon + 1e-10).all()
    more = alpha + alpha_max * 2e-6
    beyond = kl_to_p0(anchor, direction, weight, bias, more) > epsilon - 1e-10
    assert (beyond | (alpha == alpha_max)).all()


def test_a_fair_coin_by_hand() -> None:
    """p0 = (1/2, 1/2), Delta = (1, -1): pi_alpha = (s, 1 - s) with s = sigmoid(2 alpha); KL = log 2 - H(s)."""
    weight = torch.eye(2, dtype=torch.float64)
    anchor, direction = torch.zeros(1, 2).double(), torch.tensor([[1.0, -1.0]]).double()
    s = 1 / (1 + math.exp(-2 * 0.3))
    epsilon = math.log(2) + s * math.log(s) + (1 - s) * math.log(1 - s)
    assert largest_alpha(anchor, direction, (weight, None), 3.0, epsilon).item() == pytest.approx(0.3, abs=1e-5)


def test_a_token_without_direction_and_one_within_the_budget_get_all_of_alpha() -> None:
    anchor, direction, weight, bias = family(0, tokens=3)
    direction[0], direction[1] = 0.0, 1e-6 * direction[1]
    alpha = largest_alpha(anchor, direction, (weight, bias), 2.0, 1e-3)
    assert alpha[:2].tolist() == [2.0, 2.0]
    assert alpha[2] < 2.0
    assert largest_alpha(anchor[:0], direction[:0], (weight, bias), 2.0, 1e-3).shape == (0,)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    anchor, direction, weight, bias = family(3, tokens=17)
    whole = largest_alpha(anchor, direction, (weight, bias), 3.0, 0.01)
    monkeypatch.setitem(blocking.CHUNK_BYTES, "cpu", 5 * 2 * V * 8)
    monkeypatch.setitem(blocking.TILE_BYTES, "cpu", 2 * V * 8)
    torch.testing.assert_close(largest_alpha(anchor, direction, (weight, bias), 3.0, 0.01), whole)


def test_the_logged_bound_is_the_one_of_the_steering_as_applied() -> None:
    anchor, direction, weight, bias = family(1, tokens=9)
    alpha = largest_alpha(anchor, direction, (weight, bias), 3.0, 0.02)[:, None]
    found = diagnostics(anchor, anchor, alpha * direction, 1.0, weight, bias)
    assert found["kl_target_anchor"] <= 0.02
    assert found["kl_target_anchor"] <= found["hoeffding_bound"]
    delta = alpha * (direction @ weight.T)
    spread = delta.amax(-1) - delta.amin(-1)
    assert found["hoeffding_bound"] == pytest.approx((spread**2 / 8).mean().item())
