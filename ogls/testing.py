"""Checks for those who write a divergence or a steering of their own: one call in a test says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ogls.loss.divergence import Divergence
from ogls.loss.steering import Steering
from ogls.records import Role

SCALES = (0.1, 2.0, 20.0)
"""Sizes of the random logits: nearly uniform, as of a language model, nearly all mass on one token."""


def check_divergence(divergence: Divergence, vocab: int = 13, seed: int = 0, *, proper: bool = True) -> None:
    """Holds `terms` against autograd of its own summands, in fp64 and on random distributions.

    What is checked: two new tensors of the vocabulary's shape, finite even where probabilities underflow; ph is
    p_S ds/dp_S itself, constants included; a permutation of the vocabulary permutes the summands; the sum is at least
    -1e-12, and 0 where student and target are the same. Autograd has to get through `terms` for that.

    Args:
        divergence: what is checked
        vocab: number of tokens
        seed: decides the distributions
        proper: whether it is a divergence, never below 0 and 0 for equal distributions; a cross-entropy is not

    Raises:
        AssertionError: the message says what is wrong, and by how much.
    """
    name, generator = type(divergence).__name__, torch.Generator().manual_seed(seed)
    for scale in SCALES:
        logits = scale * torch.randn(2, 4, vocab, generator=generator, dtype=torch.float64)
        student, target = logits.log_softmax(-1)
        summand, ph = _terms(divergence, student, target)
        _check_derivative(divergence, student, target, ph)
        order = torch.randperm(vocab, generator=generator)
        for what, there, here in zip(
            ("summands", "ph"), _terms(divergence, student[:, order], target[:, order]), (summand, ph), strict=True
        ):
            _assert_close(there, here[:, order], f"{name}: {what} depend on the order of the vocabulary")
        if proper:
            lowest = summand.sum(-1).min().item()
            assert lowest >= -1e-12, f"{name} is below 0: {lowest:.3g}"
            highest = _terms(divergence, student, student)[0].sum(-1).abs().max().item()
            assert highest <= 1e-12, f"{name} of equal distributions is not 0: {highest:.3g}"
    for dtype in (torch.float32, torch.float64):
        far = torch.zeros(2, vocab, dtype=dtype)
        far[0, 0], far[1, -1] = 5000.0, 5000.0
        _terms(divergence, *far.log_softmax(-1).split(1))


def check_steering(steering: Steering, roles: Sequence[Role]) -> None:
    """Holds the coefficients of the views against what a steering has to be.

    What is checked: one coefficient per role; those of the anchor sum to 1, those of the direction to 0; alpha is
    finite and not negative at any step.

    Args:
        steering: what is checked
        roles: roles of a lesson's views, in the order of the views; the first is ``plain``

    Raises:
        AssertionError: the message says what is wrong.
    """
    name, roles = type(steering).__name__, list(roles)
    anchor, direction = steering.coefficients(roles)
    for part, coefficients, expected in (("anchor", anchor, 1.0), ("direction", direction, 0.0)):
        assert len(coefficients) == len(roles), (
            f"{name}: the {part} needs one coefficient per role, got {len(coefficients)} for {roles}"
        )
        total = math.fsum(coefficients)
        assert abs(total - expected) <= 1e-9, (
            f"{name}: the {part}'s coefficients sum to {total:g}, expected {expected:g}: {coefficients} for {roles}"
        )
    for step in (0, 1, 10, 100, 10**6):
        alpha = steering.alpha_at(step)
        assert 0.0 <= alpha < math.inf, f"{name}: alpha_at({step}) is {alpha}, expected a finite number of at least 0"


def _terms(divergence: Divergence, student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Summands and ph of two log-distributions, once it is sure that they are sound tensors."""
    name, given = type(divergence).__name__, (student.exp(), target.exp(), target - student)
    before = [tensor.clone() for tensor in given]
    summand, ph = divergence.terms(*given)
    for argument, tensor, kept in zip(("ps", "pt", "u"), given, before, strict=True):
        assert torch.equal(tensor, kept), f"{name} changes its argument {argument}"
    known = {tensor.data_ptr() for tensor in given}
    for what, tensor in (("summands", summand), ("ph", ph)):
        assert tensor.shape == student.shape, f"{name}: {what} of shape {list(tensor.shape)}, not {list(student.shape)}"
        assert tensor.isfinite().all(), f"{name}: {what} are not finite"
        assert tensor.data_ptr() not in known, f"{name}: {what} are no new tensor, and would be overwritten"
        known.add(tensor.data_ptr())
    return summand, ph


def _check_derivative(divergence: Divergence, student: Tensor, target: Tensor, ph: Tensor) -> None:
    """Compares ph with p_S ds/dp_S, where u = log p_T - log p_S follows p_S and p_T stays."""
    name = type(divergence).__name__
    ps = student.exp().requires_grad_()
    summand, _ = divergence.terms(ps, target.exp(), target - ps.log())
    assert summand.requires_grad, f"{name}: the summands do not depend on the student, or are detached from it"
    (slope,) = torch.autograd.grad(summand.sum(), ps)
    expected = slope * ps.detach()
    missing = (expected - ph) / ps.detach()
    same = (missing - missing.mean(-1, keepdim=True)).abs().max() <= 1e-6 * (1.0 + missing.abs().max())
    hint = f"; it misses the constant {missing.mean():g} of ds/dp_S, which matters where a clip binds" if same else ""
    _assert_close(ph, expected, f"{name}: ph is not p_S ds/dp_S{hint}")


def _assert_close(got: Tensor, expected: Tensor, complaint: str) -> None:
    gap = (got - expected).abs()
    allowed = 1e-12 + 1e-9 * expected.abs()
    worst = (gap - allowed).argmax()
    assert (gap <= allowed).all(), (
        f"{complaint}: got {got.flatten()[worst]:.6g}, expected {expected.flatten()[worst]:.6g}"
    )
