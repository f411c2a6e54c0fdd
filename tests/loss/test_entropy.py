"""The student's entropy, chunk by chunk, against the naive one from all logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ogls.loss import chunked, tiles
from ogls.loss.entropy import student_entropy

T, V, H = 23, 13, 5


def setup(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """States that require a gradient, weight, bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, H), (V, H), (V,))
    hidden, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), bias.to(dtype)


def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logp = torch.nn.functional.linear(hidden, weight, bias).div(temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).detach()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("chunk", [None, 1, 2, 7, T])
def test_it_is_the_naive_entropy(chunk: int | None, temperature: float, with_bias: bool) -> None:
    hidden, weight, bias = setup()
    given = bias if with_bias else None
    ours = student_entropy(hidden, weight, given, temperature, chunk)
    torch.testing.assert_close(ours, naive(hidden, weight, given, temperature), rtol=1e-12, atol=1e-13)
    assert not ours.requires_grad


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_logits_of_all_tokens_are_never_there(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias = setup()
    whole = student_entropy(hidden, weight, bias)
    monkeypatch.setitem(tiles.CHUNK_BYTES, "cpu", 8 * V * 8)
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 3 * V * 8)
    rows: list[int] = []
    apply_head = chunked.apply_head

    def counted(states: Tensor, *arguments: Tensor | None, **options: Tensor | None) -> None:
        rows.append(len(states))
        apply_head(states, *arguments, **options)

    monkeypatch.setattr(chunked, "apply_head", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        torch.testing.assert_close(student_entropy(hidden, weight, bias), whole, rtol=1e-12, atol=1e-13)
    finally:
        torch.set_num_threads(before)
    assert max(rows) <= 8
    assert sum(rows) >= T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_exact_at_both_ends(dtype: torch.dtype) -> None:
    """No logit differs: log V. One is 5,000 above the others, which underflow: 0. Two share the mass: log 2."""
    logits = torch.zeros(3, V, dtype=dtype)
    logits[1, 4], logits[2, :2] = 5000.0, 5000.0
    values = student_entropy(logits, torch.eye(V, dtype=dtype), None)
    assert values.tolist() == pytest.approx([math.log(V), 0.0, math.log(2)], rel=1e-6)
    assert values.dtype == dtype


def test_a_head_in_bf16_has_fp32_entropies() -> None:
    hidden, weight, bias = setup(torch.bfloat16)
    values = student_entropy(hidden, weight, bias)
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        values.double(), naive(hidden.double(), weight.double(), bias.double(), 1.0), atol=0.02, rtol=0
    )


def test_no_tokens_have_no_entropy() -> None:
    hidden, weight, bias = setup()
    assert student_entropy(hidden[:0], weight, bias).shape == (0,)


def test_a_trained_head_gets_no_gradient() -> None:
    hidden, weight, bias = setup()
    assert not student_entropy(hidden, weight.requires_grad_(), bias).requires_grad
