"""Top-k and tail against a dense formula with autograd, and at the edges where it has to be the full divergence."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ogls.loss import tiles as blocking
from ogls.loss.chunked import chunked_divergence
from ogls.loss.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL, SkewKL
from ogls.loss.topk import TopK

T, V, H = 19, 13, 5
ALL = [ForwardKL(), ReverseKL(), JensenShannon(0.5), SkewKL(0.1)]
Setup = tuple[Tensor, Tensor, Tensor, Tensor]


def setup(seed: int = 0, gap: float = 1.0, dtype: torch.dtype = torch.float64) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(T, H, generator=generator, dtype=dtype)
    target = student + gap * torch.randn(T, H, generator=generator, dtype=dtype)
    weight, bias = torch.randn(V, H, generator=generator, dtype=dtype), torch.randn(V, generator=generator, dtype=dtype)
    return student.requires_grad_(), target, weight, bias


def ours(states: Setup, divergence: Divergence, support: TopK, **options: Any) -> Tensor:
    ids = torch.arange(T) % V
    return chunked_divergence(*states, divergence, support=support, token_ids=ids, **options)[0]


def dense(
    states: Setup, divergence: Divergence, support: TopK, temperature: float = 1.0, clip: float | None = None
) -> Tensor:
    """Two distributions over S and the rest, token by token, by the printed formulas; gradients by autograd."""
    student, target, weight, bias = states
    values = []
    for hs, ht in zip(student, target, strict=True):
        p, q = ((weight @ h + bias).div(temperature).softmax(-1) for h in (hs, ht))
        chosen = set(p.topk(support.k).indices.tolist())
        if support.of == "union":
            chosen |= set(q.topk(support.k).indices.tolist())
        rest = [v for v in range(V) if v not in chosen]
        chosen = sorted(chosen)
        p, q = (torch.cat([x[chosen], x[rest].sum()[None]]) if rest else x[chosen] for x in (p, q))
        match divergence:
            case ForwardKL():
                summand = q * (q / p).log()
            case ReverseKL():
                summand = p * (p / q).log()
            case JensenShannon(beta):
                m = (1 - beta) * p + beta * q
                summand = beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()
            case SkewKL(skew):
                summand = q * (q / ((1 - skew) * p + skew * q)).log()
        values.append((summand if clip is None else summand.clamp(-clip, clip)).sum())
    return torch.stack(values)


def assert_same(got: Tensor, expected: Tensor, hidden: Tensor, tolerance: float = 1e-10) -> None:
    weights = torch.linspace(0.5, 2.0, T, dtype=got.dtype)
    gradients = [torch.autograd.grad((weights * values).sum(), hidden)[0] for values in (got, expected)]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.7}, {"clip": 0.03}], ids=["", "temperature", "clip"])
@pytest.mark.parametrize("of", ["student", "union"])
@pytest.mark.parametrize("k", [1, 4, V - 1, V])
@pytest.mark.parametrize("divergence", ALL)
def test_value_and_gradient_are_those_of_the_dense_formula(
    divergence: Divergence, k: int, of: Any, options: dict[str, float]
) -> None:
    states, support = setup(), TopK(k, of)
    got = ours(states, divergence, support, chunk_rows=7, **options)
    assert_same(got, dense(states, divergence, support, **options), states[0])


@pytest.mark.parametrize("of", ["student", "union"])
@pytest.mark.parametrize("divergence", ALL)
def test_the_whole_vocabulary_is_the_full_divergence(divergence: Divergence, of: Any) -> None:
    states = setup()
    for k in (V, V + 50):
        full, expected = chunked_divergence(*states, divergence, token_ids=torch.arange(T) % V)
        assert_same(ours(states, divergence, TopK(k, of)), full, states[0])
    _, logprobs = chunked_divergence(*states, divergence, support=TopK(2), token_ids=torch.arange(T) % V)
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("divergence", ALL)
def test_merging_tokens_never_adds_divergence(divergence: Divergence) -> None:
    states = setup(seed=4)
    of_k = [ours(states, divergence, TopK(k)).detach() for k in range(1, V + 1)]
    assert all((more >= less - 1e-12).all() for less, more in pairwise(of_k))


def test_blocks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    states, support = setup(), TopK(3, "union")
    whole = ours(states, JensenShannon(), support)
    monkeypatch.setitem(blocking.CHUNK_BYTES, "cpu", 8 * 2 * V * 8)
    monkeypatch.setitem(blocking.TILE_BYTES, "cpu", 3 * V * 8)
    assert_same(ours(states, JensenShannon(), support), whole, states[0], 1e-12)


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_a_tail_of_nothing_stays_finite(divergence: Divergence, scale: float) -> None:
    """In fp32, with logits so far apart that all but one probability underflow, on different tokens on both sides."""
    student, target, weight, _ = setup(dtype=torch.float32)
    states = (student, target, scale * weight, torch.zeros(V))
    values = ours(states, divergence, TopK(2))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()


def test_a_student_at_its_target_is_left_alone() -> None:
    student, _, weight, bias = setup(dtype=torch.float32)
    values = ours((student, student.detach().clone(), weight, bias), JensenShannon(), TopK(3))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert not values.any()
    assert not gradient.any()


def test_an_empty_support_is_refused() -> None:
    with pytest.raises(ValueError, match="k >= 1, got k=0"):
        TopK(0)
