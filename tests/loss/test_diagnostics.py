"""The diagnostics are their formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ogls.loss.diagnostics import diagnostics
from tests.loss.test_chunked import setup


def test_no_tokens() -> None:
    student, target, weight, bias = setup()
    assert diagnostics(student[:0], target[:0], target[:0], 1.0, weight, bias) == {}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0])
def test_diagnostics_are_their_formulas(alpha: float) -> None:
    student, anchor, weight, bias = setup()
    direction = setup(1)[1]
    temperature, markers = 1.3, [2, 7]
    values = diagnostics(student.detach(), anchor, direction, alpha, weight, bias, temperature, markers)
    z = [torch.nn.functional.linear(h, weight, bias) / temperature for h in (student.detach(), anchor)]
    delta = direction @ weight.T / temperature
    p, p0, q = z[0].softmax(-1), z[1].softmax(-1), (z[1] + alpha * delta).softmax(-1)
    expected = {
        "kl_target_student": (q * (q / p).log()).sum(-1),
        "kl_target_anchor": (q * (q / p0).log()).sum(-1),
        "hoeffding_bound": alpha**2 * (delta.amax(-1) - delta.amin(-1)) ** 2 / 8,
        "tv_target_anchor": (q - p0).clamp(min=0).sum(-1),
        "target_entropy": torch.distributions.Categorical(probs=q).entropy(),
        "student_entropy": torch.distributions.Categorical(probs=p).entropy(),
        "delta_std": ((p0 * delta**2).sum(-1) - (p0 * delta).sum(-1) ** 2).sqrt(),
        "delta_range": delta.amax(-1) - delta.amin(-1),
        "marker_mass_target": q[:, 2] + q[:, 7],
        "marker_mass_student": p[:, 2] + p[:, 7],
    }
    assert values == pytest.approx({name: value.mean().item() for name, value in expected.items()}, abs=1e-9)


def test_a_target_of_another_model_has_its_own_head() -> None:
    """Twice the states under half the head are the same logits."""
    student, anchor, weight, bias = setup()
    direction = setup(1)[1]
    one = diagnostics(student.detach(), anchor, direction, 0.5, weight, bias)
    half = 2 * torch.cat([anchor, anchor], 1), 2 * torch.cat([direction, direction], 1)
    head = torch.cat([weight, weight], 1) / 4, bias
    assert diagnostics(student.detach(), *half, 0.5, weight, bias, head_target=head) == pytest.approx(one, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), alpha=st.floats(0, 10))
def test_steering_is_within_its_bound_and_grows_by_its_variance(seed: int, alpha: float) -> None:
    """KL(pi_alpha || p0) <= alpha² range² / 8 and d KL / d alpha = alpha Var_alpha(Delta)."""
    student, anchor, weight, bias = setup(seed)
    direction = setup(seed + 1)[1]

    def at(strength: float) -> dict[str, float]:
        return diagnostics(student[:1].detach(), anchor[:1], direction[:1], strength, weight, bias)

    assert at(alpha)["kl_target_anchor"] <= at(alpha)["hoeffding_bound"] + 1e-12
    delta = direction[:1] @ weight.T
    q = (anchor[:1] @ weight.T + bias + alpha * delta).softmax(-1)
    variance = ((q * delta**2).sum() - (q * delta).sum() ** 2).item()
    slope = (at(alpha + 1e-4)["kl_target_anchor"] - at(max(alpha - 1e-4, 0.0))["kl_target_anchor"]) / (
        alpha + 1e-4 - max(alpha - 1e-4, 0.0)
    )
    assert slope == pytest.approx(alpha * variance, rel=1e-2, abs=1e-2)
