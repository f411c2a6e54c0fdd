"""Divergences: against their textbook formulas, on three tokens by hand, and under what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ogls.loss.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL, SkewKL, clip_terms

ALL = [ForwardKL(), ReverseKL(), JensenShannon(), JensenShannon(0.2), SkewKL(0.1), SkewKL(0.7)]
seeds = st.integers(0, 2**31 - 1)
scales = st.floats(1e-3, 60.0)


def logits(seed: int, scale: float, rows: int = 3, vocab: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, target = torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64) * scale
    return student, target


def value(divergence: Divergence, student: Tensor, target: Tensor) -> Tensor:
    """D [rows] from logits."""
    ls, lt = student.log_softmax(-1), target.log_softmax(-1)
    return divergence.terms(ls.exp(), lt.exp(), lt - ls)[0].sum(-1)


def textbook(divergence: Divergence, student: Tensor, target: Tensor) -> Tensor:
    """The formula of the class's docstring, in probabilities, differentiable by autograd."""
    p, q = student.softmax(-1), target.softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    match divergence:
        case ForwardKL():
            return kl(q, p)
        case ReverseKL():
            return kl(p, q)
        case JensenShannon(beta):
            m = (1 - beta) * p + beta * q
            return beta * kl(q, m) + (1 - beta) * kl(p, m)
        case SkewKL(skew):
            return kl(q, (1 - skew) * p + skew * q)
    raise AssertionError(divergence)


@pytest.mark.parametrize("divergence", ALL)
def test_value_and_gradient_are_the_textbooks(divergence: Divergence) -> None:
    student, target = logits(0, 2.0)
    student.requires_grad_()
    expected = textbook(divergence, student, target)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    with torch.no_grad():
        ls, lt = student.log_softmax(-1), target.log_softmax(-1)
        summand, ph = divergence.terms(ls.exp(), lt.exp(), lt - ls)
        gradient = ph - ls.exp() * ph.sum(-1, keepdim=True)
    torch.testing.assert_close(summand.sum(-1), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-13)


def test_three_tokens_by_hand() -> None:
    """Student (1/2, 1/4, 1/4), target (1/4, 1/4, 1/2): u = (-ln 2, 0, ln 2), m = (3/8, 1/4, 3/8)."""
    ps, pt = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    u = (pt / ps).log()
    ln2 = math.log(2)
    summand, ph = ForwardKL().terms(ps, pt, u)
    assert summand.tolist() == pytest.approx([-ln2 / 4, 0, ln2 / 2])
    assert (ph - ps * ph.sum()).tolist() == pytest.approx([0.25, 0, -0.25])
    summand, ph = ReverseKL().terms(ps, pt, u)
    assert summand.tolist() == pytest.approx([ln2 / 2, 0, -ln2 / 4])
    # p (-u - KL) = (1/2) (ln 2 - ln2 / 4), (1/4) (-ln2 / 4), (1/4) (-ln 2 - ln2 / 4)
    assert (ph - ps * ph.sum()).tolist() == pytest.approx([3 * ln2 / 8, -ln2 / 16, -5 * ln2 / 16])
    jsd = 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 3)  # KL(p || m) = KL(q || m) = this, by symmetry
    assert JensenShannon().terms(ps, pt, u)[0].sum().item() == pytest.approx(jsd)
    skew = 0.25 * math.log((1 / 4) / (3 / 8)) + 0.5 * math.log((1 / 2) / (3 / 8))
    assert SkewKL(0.5).terms(ps, pt, u)[0].sum().item() == pytest.approx(skew)


@pytest.mark.parametrize("divergence", ALL)
@settings(max_examples=40, deadline=None)
@given(seed=seeds, scale=scales)
def test_bounds(divergence: Divergence, seed: int, scale: float) -> None:
    d = value(divergence, *logits(seed, scale))
    assert torch.isfinite(d).all()
    assert d.min() >= -1e-12
    if divergence == JensenShannon():
        assert d.max() <= math.log(2) + 1e-12
    if isinstance(divergence, SkewKL):
        assert d.max() <= -math.log(divergence.skew) + 1e-12


@pytest.mark.parametrize("divergence", ALL)
@settings(max_examples=20, deadline=None)
@given(seed=seeds, scale=scales, shift=st.floats(-100, 100))
def test_shift_and_permutation_change_nothing(divergence: Divergence, seed: int, scale: float, shift: float) -> None:
    student, target = logits(seed, scale)
    d = value(divergence, student, target)
    torch.testing.assert_close(value(divergence, student + shift, target - shift), d, rtol=1e-10, atol=1e-10)
    order = torch.randperm(student.shape[-1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(value(divergence, student[:, order], target[:, order]), d, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", ALL)
def test_equal_distributions_are_exactly_zero(divergence: Divergence) -> None:
    p = logits(1, 3.0)[0].softmax(-1)
    assert value(divergence, p.log(), p.log()).abs().max() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", ALL)
def test_disjoint_distributions_stay_finite(divergence: Divergence, dtype: torch.dtype) -> None:
    """|u| far beyond what exp can hold, and probabilities that underflow to 0 on either side."""
    student = torch.tensor([[0.0, -5000.0, 0.0], [0.0, -85.0, 1.0]], dtype=dtype)
    target = torch.tensor([[-5000.0, 0.0, 0.0], [-85.0, 0.0, 1.0]], dtype=dtype)
    ls, lt = student.log_softmax(-1), target.log_softmax(-1)
    for terms in divergence.terms(ls.exp(), lt.exp(), lt - ls):
        assert torch.isfinite(terms).all()


def test_mixture_divergences_reach_their_limits() -> None:
    student, target = logits(3, 2.0)
    for far in (target, 200.0 * target):  # beyond what exp can take, too
        torch.testing.assert_close(value(SkewKL(0.0), student, far), value(ForwardKL(), student, far))
    # JSD(b) / b -> KL(target || student) as b -> 0, and JSD(b) / (1 - b) -> KL(student || target) as b -> 1
    small, large = value(JensenShannon(1e-6), student, target), value(JensenShannon(1 - 1e-6), student, target)
    torch.testing.assert_close(small / 1e-6, value(ForwardKL(), student, target), rtol=1e-3, atol=0)
    torch.testing.assert_close(large / 1e-6, value(ReverseKL(), student, target), rtol=1e-3, atol=0)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("divergence", ALL)
def test_clip_has_the_derivative_of_the_clamped_sum(divergence: Divergence, one_sided: bool) -> None:
    clip = 0.02
    student, target = logits(4, 1.5)
    student.requires_grad_()
    ls, lt = student.log_softmax(-1), target.log_softmax(-1)
    p, q, u = ls.exp(), lt.exp(), lt - ls
    match divergence:
        case ForwardKL():
            summand = q * u
        case ReverseKL():
            summand = -p * u
        case JensenShannon(beta):
            m = (1 - beta) * p + beta * q
            summand = beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()
        case SkewKL(skew):
            summand = q * (q / ((1 - skew) * p + skew * q)).log()
    clamped = summand.clamp(max=clip) if one_sided else summand.clamp(-clip, clip)
    assert (clamped != summand).any()
    assert (clamped == summand).any()
    (expected,) = torch.autograd.grad(clamped.sum(), student)
    with torch.no_grad():
        ours, ph = divergence.terms(p, q, u)
        clip_terms(ours, ph, clip, one_sided)
        gradient = ph - p * ph.sum(-1, keepdim=True)
    torch.testing.assert_close(ours, clamped.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JensenShannon(0.0), "0 < beta < 1, got beta=0.0"),
        (lambda: JensenShannon(1.0), "0 < beta < 1, got beta=1.0"),
        (lambda: SkewKL(1.0), "0 <= skew < 1, got skew=1.0"),
        (lambda: SkewKL(-0.1), "0 <= skew < 1, got skew=-0.1"),
    ],
)
def test_parameters_out_of_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
