"""A GPU kernel makes the row passes of `ogls.loss.chunked`.

One program works on one token, over blocks of the vocabulary. A row of a large vocabulary does not fit into a core, and
reading it is what costs time. For the two KLs without a clip the row is read twice:

    1   Z_S, Z_T = log sum e^z_S, log sum e^(z_S + u) by running maxima, and E_S[u], E_T[u] beside them
    2   dD/dz over the logits, by KL(T || S) = E_T[u] - (Z_T - Z_S) or KL(S || T) = (Z_T - Z_S) - E_S[u]

All other divergences read it once more in between, for sums that need both distributions. No further memory of the size
of the logits is needed, so that a whole chunk is one launch.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Inside kernels it is Triton's language, which is not quite Python's.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ogls.loss.divergence import KINDS as KINDS
from ogls.loss.divergence import LARGE, Divergence, mixture_weight

BLOCK = 4096  # vocabulary entries per block
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": True}  # each thread has 16 entries of a block


def divergence_rows(
    logits: Tensor,
    gaps: Tensor,
    values: Tensor,
    ids: Tensor | None = None,
    logprobs: Tensor | None = None,
    *,
    divergence: Divergence,
    temperature: float,
    clip: float | None,
    one_sided: bool,
    wants_gradient: bool,
) -> None:
    """Makes all row passes over some tokens, with arguments and results of `ogls.loss.chunked.divergence_rows`.

    All tensors are contiguous, and `divergence` is of one of the `KINDS`.
    """
    _rows[(len(logits),)](
        *(logits, gaps, values, ids, logprobs, logits.shape[-1]),
        KIND=type(divergence).__name__,
        WEIGHT=mixture_weight(divergence),
        TEMPERATURE=temperature,
        CLIP=clip,
        ONE_SIDED=one_sided,
        GRADIENT=wants_gradient,
        LARGE=LARGE,
        BLOCK=BLOCK,
        **OPTIONS,
    )


@triton.jit
def _rows(
    logits,
    gaps,
    values,
    ids,
    logprobs,
    vocab,
    KIND: tl.constexpr,
    WEIGHT: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    CLIP: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    GRADIENT: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    gaps += row * vocab
    dtype = values.dtype.element_ty
    closed: tl.constexpr = CLIP is None and (KIND == "ForwardKL" or KIND == "ReverseKL")

    top_s = tl.full((), float("-inf"), dtype)
    top_t = tl.full((), float("-inf"), dtype)
    sum_s = tl.zeros((BLOCK,), dtype)
    sum_t = tl.zeros((BLOCK,), dtype)
    sum_u = tl.zeros((BLOCK,), dtype)  # under the target for the forward KL, under the student for the reverse one
    for start in range(0, vocab, BLOCK):
        z, u = load_block(logits, gaps, start, vocab, TEMPERATURE, dtype, BLOCK)
        new_s = tl.maximum(top_s, tl.max(z, 0))
        new_t = tl.maximum(top_t, tl.max(z + u, 0))
        fade_s, fade_t = tl.exp(top_s - new_s), tl.exp(top_t - new_t)
        p, q = tl.exp(z - new_s), tl.exp(z + u - new_t)
        if closed:
            sum_u = sum_u * fade_t + q * u if KIND == "ForwardKL" else sum_u * fade_s + p * u
        sum_s = sum_s * fade_s + p
        sum_t = sum_t * fade_t + q
        top_s, top_t = new_s, new_t
    mass_s, mass_t = tl.sum(sum_s, 0), tl.sum(sum_t, 0)
    shift = top_t - top_s + tl.log(mass_t) - tl.log(mass_s)  # Z_T - Z_S
    normaliser = top_s + tl.log(mass_s)
    if logprobs is not None:
        tl.store(logprobs + row, tl.load(logits + tl.load(ids + row)).to(dtype) / TEMPERATURE - normaliser)

    if closed:
        if KIND == "ForwardKL":
            value = tl.sum(sum_u, 0) / mass_t - shift
            total = value * 0.0 - 1.0
        else:
            value = shift - tl.sum(sum_u, 0) / mass_s
            total = value + 1.0
    else:
        sum_summand = tl.zeros((BLOCK,), dtype)
        sum_ph = tl.zeros((BLOCK,), dtype)
        for start in range(0, vocab, BLOCK):
            z, u = load_block(logits, gaps, start, vocab, TEMPERATURE, dtype, BLOCK)
            _, summand, ph = _terms(z - normaliser, u - shift, KIND, WEIGHT, CLIP, ONE_SIDED, LARGE)
            sum_summand += summand
            sum_ph += ph
        value, total = tl.sum(sum_summand, 0), tl.sum(sum_ph, 0)
    tl.store(values + row, value)

    if GRADIENT:
        for start in range(0, vocab, BLOCK):
            z, u = load_block(logits, gaps, start, vocab, TEMPERATURE, dtype, BLOCK)
            p, _, ph = _terms(z - normaliser, u - shift, KIND, WEIGHT, CLIP, ONE_SIDED, LARGE)
            columns = start + tl.arange(0, BLOCK)
            tl.store(logits + columns, (ph - p * total).to(logits.dtype.element_ty), mask=columns < vocab)


@triton.jit
def load_block(logits, gaps, start, vocab, TEMPERATURE: tl.constexpr, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Returns a block of z_S and of z_T - z_S; beyond the vocabulary they are -inf and 0."""
    columns = start + tl.arange(0, BLOCK)
    z = tl.load(logits + columns, mask=columns < vocab, other=float("-inf")).to(dtype)
    u = tl.load(gaps + columns, mask=columns < vocab, other=0.0).to(dtype)
    return z / TEMPERATURE, u / TEMPERATURE


@triton.jit
def _terms(
    logp,
    u,
    KIND: tl.constexpr,
    WEIGHT: tl.constexpr,
    CLIP: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    LARGE: tl.constexpr,
):
    """Returns p_S, and s and ph as `Divergence.terms` and `clip_terms` of `ogls.loss.divergence` make them."""
    p, q = tl.exp(logp), tl.exp(logp + u)
    if KIND == "ForwardKL":
        summand, ph = q * u, -q
    elif KIND == "ReverseKL":
        summand = -p * u
        ph = summand + p
    else:
        low = tl.minimum(u, LARGE)
        ratio = 1.0 + WEIGHT * (tl.exp(low) - 1.0)
        k = tl.log(ratio) + (u - low) if WEIGHT > 0.0 else 0.0 * u
        if KIND == "JensenShannon":
            ph = (WEIGHT - 1.0) * p * k
            summand = WEIGHT * q * (u - k) + ph
        else:
            ph = (WEIGHT - 1.0) * q / ratio
            summand = q * (u - k)
    if CLIP is not None:
        clip = tl.full((), CLIP, summand.dtype)  # a bare constant is fp32 up to Triton 3.7
        binds = summand > clip if ONE_SIDED else tl.abs(summand) > clip
        ph = tl.where(binds, 0.0, ph)
        summand = tl.minimum(summand, clip)
        if not ONE_SIDED:
            summand = tl.maximum(summand, -clip)
    return p, summand, ph
