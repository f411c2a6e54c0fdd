"""A GPU kernel finds the largest alpha within a KL budget, one token per program, without waiting for the CPU."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Inside kernels it is Triton's language, which is not quite Python's.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ogls.loss.triton_rows import BLOCK, OPTIONS, load_block


def bisect_rows(
    logits: Tensor, deltas: Tensor, alphas: Tensor, *, alpha_max: float, epsilon: float, halvings: int
) -> None:
    """Fills `alphas` [rows] as `ogls.loss.alpha_bound.bisect_tile` does; all tensors are contiguous."""
    options = {"ALPHA_MAX": alpha_max, "EPSILON": epsilon, "HALVINGS": halvings, "BLOCK": BLOCK} | OPTIONS
    _alphas[(len(logits),)](logits, deltas, alphas, logits.shape[-1], **options)


@triton.jit
def _alphas(
    logits,
    deltas,
    alphas,
    vocab,
    ALPHA_MAX: tl.constexpr,
    EPSILON: tl.constexpr,
    HALVINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    deltas += row * vocab
    dtype = alphas.dtype.element_ty
    most = tl.full((BLOCK,), float("-inf"), dtype)
    least = tl.full((BLOCK,), float("inf"), dtype)
    for start in range(0, vocab, BLOCK):
        z, delta = load_block(logits, deltas, start, vocab, 1.0, dtype, BLOCK)
        most = tl.maximum(most, tl.where(z == float("-inf"), most, delta))
        least = tl.minimum(least, tl.where(z == float("-inf"), least, delta))
    spread = tl.max(most, 0) - tl.min(least, 0)
    zero = tl.zeros((), dtype)
    normaliser, _ = _tilted(logits, deltas, zero, vocab, dtype, BLOCK)
    high = zero + ALPHA_MAX
    low = tl.minimum(high, tl.sqrt(zero + 8.0 * EPSILON) / tl.maximum(spread, 1e-37))
    norm, mean = _tilted(logits, deltas, high, vocab, dtype, BLOCK)
    low = tl.where(high * mean - (norm - normaliser) <= EPSILON, high, low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        norm, mean = _tilted(logits, deltas, middle, vocab, dtype, BLOCK)
        within = middle * mean - (norm - normaliser) <= EPSILON  # KL(pi_alpha || p0)
        low, high = tl.where(within, middle, low), tl.where(within, high, middle)
    tl.store(alphas + row, low)


@triton.jit
def _tilted(logits, deltas, alpha, vocab, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Returns log sum e^(z + alpha Delta), and the mean of Delta under softmax(z + alpha Delta)."""
    top = tl.full((), float("-inf"), dtype)
    mass = tl.zeros((BLOCK,), dtype)
    total = tl.zeros((BLOCK,), dtype)
    for start in range(0, vocab, BLOCK):
        z, delta = load_block(logits, deltas, start, vocab, 1.0, dtype, BLOCK)
        x = z + alpha * delta
        new = tl.maximum(top, tl.max(x, 0))
        fade, p = tl.exp(top - new), tl.exp(x - new)
        mass = mass * fade + p
        total = total * fade + p * delta
        top = new
    return top + tl.log(tl.sum(mass, 0)), tl.sum(total, 0) / tl.sum(mass, 0)
