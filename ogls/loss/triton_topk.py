"""GPU kernels make the passes over whole rows that a top-k divergence needs.

Of a row, k columns are taken singly, which torch gathers: work on [rows, k] costs little. Their logits become -inf, and
two kernels do the rest: one reads logits and gaps once and gives the mass of all other tokens under student and target,
the other overwrites the logits by the gradient, which is p_S times one number per row (`ogls.loss.topk`).
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Inside kernels it is Triton's language, which is not quite Python's.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ogls.loss.divergence import Divergence
from ogls.loss.topk import TopK, bucketed
from ogls.loss.triton_rows import BLOCK, OPTIONS, load_block


def topk_rows(
    logits: Tensor,
    gaps: Tensor,
    values: Tensor,
    ids: Tensor | None = None,
    logprobs: Tensor | None = None,
    *,
    divergence: Divergence,
    support: TopK,
    temperature: float,
    clip: float | None,
    one_sided: bool,
    wants_gradient: bool,
) -> None:
    """Makes all row passes over some tokens, with arguments and results of `ogls.loss.topk.topk_rows`.

    All tensors are contiguous, and `support` is the student's.
    """
    dtype = values.dtype
    inside = logits.topk(min(support.k, logits.shape[-1]), sorted=False).indices
    z, u = (x.gather(-1, inside).to(dtype) / temperature for x in (logits, gaps))
    sampled = None if ids is None else logits.gather(-1, ids[:, None]).to(dtype) / temperature
    logits.scatter_(-1, inside, -torch.inf)
    tails = torch.empty(2, len(logits), dtype=dtype, device=logits.device)
    grid, vocab = (len(logits),), logits.shape[-1]
    _tails[grid](logits, gaps, tails[0], tails[1], vocab, TEMPERATURE=temperature, BLOCK=BLOCK, **OPTIONS)
    log_tail_p, log_tail_q = tails[:, :, None]
    student = torch.logaddexp(z.logsumexp(-1, keepdim=True), log_tail_p)
    target = torch.logaddexp((z + u).logsumexp(-1, keepdim=True), log_tail_q)
    if sampled is not None and logprobs is not None:
        logprobs.copy_((sampled - student).squeeze(-1))
    value, gradient, factor = bucketed(
        *((z - student).exp(), (z + u - target).exp(), u - (target - student)),
        *((log_tail_p - student).exp(), (log_tail_q - target).exp()),
        divergence=divergence,
        clip=clip,
        one_sided=one_sided,
    )
    values.copy_(value)
    if wants_gradient:
        scale = (factor, student) = factor.squeeze(-1).contiguous(), student.squeeze(-1).contiguous()
        _gradients[grid](logits, *scale, vocab, TEMPERATURE=temperature, BLOCK=BLOCK, **OPTIONS)
        logits.scatter_(-1, inside, gradient.to(logits.dtype))


@triton.jit
def _tails(logits, gaps, student, target, vocab, TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr):
    """Fills `student` and `target` with log sum e^z and log sum e^(z + u) of each row; both are -inf where z is."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    gaps += row * vocab
    dtype = student.dtype.element_ty
    top_s = tl.full((), float("-inf"), dtype)
    top_t = tl.full((), float("-inf"), dtype)
    sum_s = tl.zeros((BLOCK,), dtype)
    sum_t = tl.zeros((BLOCK,), dtype)
    for start in range(0, vocab, BLOCK):
        z, u = load_block(logits, gaps, start, vocab, TEMPERATURE, dtype, BLOCK)
        new_s = tl.maximum(top_s, tl.max(z, 0))
        new_t = tl.maximum(top_t, tl.max(z + u, 0))
        base_s = tl.where(new_s == float("-inf"), 0.0, new_s)  # so far, all of them can be taken singly
        base_t = tl.where(new_t == float("-inf"), 0.0, new_t)
        sum_s = sum_s * tl.exp(top_s - base_s) + tl.exp(z - base_s)
        sum_t = sum_t * tl.exp(top_t - base_t) + tl.exp(z + u - base_t)
        top_s, top_t = new_s, new_t
    tl.store(student + row, tl.where(top_s == float("-inf"), top_s, top_s + tl.log(tl.sum(sum_s, 0))))
    tl.store(target + row, tl.where(top_t == float("-inf"), top_t, top_t + tl.log(tl.sum(sum_t, 0))))


@triton.jit
def _gradients(logits, factors, normalisers, vocab, TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr):
    """Overwrites the logits by factor e^(z - normaliser)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    dtype = factors.dtype.element_ty
    factor, normaliser = tl.load(factors + row), tl.load(normalisers + row)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < vocab, other=float("-inf")).to(dtype) / TEMPERATURE
        gradient = factor * tl.exp(z - normaliser)
        tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < vocab)
