"""The chunked loss: hidden states in, weighted sums out, the logits of all tokens never in memory at once.

Student and target share the frozen head W, so z_T - z_S = W (h_T - h_S): the second GEMM is applied to the *difference*
of the hidden states. Rounding of low-precision logits then is common to both sides and a small divergence keeps its
gradient. That gradient with respect to the student's states is taken in the forward pass, while the logits are there:

    z_S = h_S Wᵀ + b        u = (h_T - h_S) Wᵀ        dh = (dD/dz_S) W        three GEMMs a chunk

The first two are one product of twice as many rows. The GEMMs run on chunks of tokens, the row passes (softmax,
divergence, gradient) on tiles of a few rows that stay in the cache (see `blocking`), one by one or compiled into few,
on a GPU by one kernel for all (`ogls.loss.triton_rows`); the gradient overwrites the logits. Row statistics are fp32
(fp64 under a fp64 head).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ogls.loss.divergence import Divergence, clip_terms
from ogls.loss.tiles import chunks, for_each_tile
from ogls.system.sizes import rounded_up


def chunked_divergence(
    hidden_student: Tensor,
    hidden_target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    clip: float | None = None,
    one_sided: bool = False,
    token_ids: Tensor | None = None,
    chunk_rows: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """D(softmax(z_T / temperature), softmax(z_S / temperature)) of every token, differentiable in `hidden_student`.

    hidden_student, hidden_target [tokens, hidden]; weight [vocab, hidden] and bias [vocab] of the frozen head. No
    gradient flows to the target. `clip` bounds each vocabulary summand (see `clip_terms`). `chunk_rows` overrides the
    byte budget. `compiled` fuses the row passes by torch.compile: the same results to rounding in two thirds of their
    time on a CPU, after 18 s of building once a machine and 6 s of loading once a process. On a GPU it is for
    divergences of one's own.

    Returns the divergences [tokens] and, when `token_ids` [tokens] are given, the student's detached log-probs of those
    tokens at the same temperature.
    """
    check_states(hidden_student, weight, bias, hidden_target=hidden_target, token_ids=token_ids)
    wants_gradient = torch.is_grad_enabled() and hidden_student.requires_grad
    num_tokens = len(hidden_student)
    students, targets, ids = padded(hidden_student.detach(), hidden_target, token_ids)
    gradient = torch.empty_like(students, dtype=weight.dtype) if wants_gradient else None
    values = torch.empty(len(students), dtype=accumulation_dtype(weight), device=weight.device)
    logprobs = None if ids is None else torch.empty_like(values)
    row_passes = passes(
        divergence,
        weight.device,
        compiled,
        temperature=temperature,
        clip=clip,
        one_sided=one_sided,
        wants_gradient=wants_gradient,
    )
    with torch.no_grad():
        for rows, buffers in chunks(len(values), weight, 2, chunk_rows):
            near = None if ids is None else ids[rows]
            reached = logits_and_gaps(students[rows], targets[rows], weight, bias, near, out=buffers)
            logits, gaps = buffers
            sampled = (None, None) if ids is None or logprobs is None else (ids[rows], logprobs[rows])
            row_passes(logits, gaps, values[rows], *sampled)
            values[rows].index_fill_(0, reached, 0.0)
            logits.index_fill_(0, reached, 0.0)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[rows])
    values = attach(hidden_student, values[:num_tokens], gradient, temperature)
    return values, None if logprobs is None else logprobs[:num_tokens]


def passes(
    divergence: Divergence, device: torch.device, compiled: bool, **options: float | bool | None
) -> Callable[..., None]:
    """`divergence_rows` for all rows of a chunk, by the quickest way that `device` and `divergence` have."""
    if device.type == "cuda" and not compiled:
        from ogls.loss import triton_rows  # a module that comes with torch for GPUs only

        if type(divergence) in triton_rows.KINDS:
            return partial(triton_rows.divergence_rows, divergence=divergence, **options)
    of_tile = partial(fused(divergence_rows) if compiled else divergence_rows, divergence=divergence, **options)
    return partial(for_each_tile, of_tile, compiled=compiled)


def divergence_rows(
    logits: Tensor,
    gaps: Tensor,
    values: Tensor,
    ids: Tensor | None,
    logprobs: Tensor | None,
    *,
    divergence: Divergence,
    temperature: float,
    clip: float | None,
    one_sided: bool,
    wants_gradient: bool,
) -> None:
    """All row passes over some tokens: fills `values` and `logprobs` [rows], and leaves dD/dz in `logits`.

    logits = z_S and gaps = z_T - z_S [rows, vocab], both used up; z = logits / temperature.
    """
    z, u = logits.to(values.dtype), gaps.to(values.dtype)
    if temperature != 1.0:
        z, u = z / temperature, u / temperature
    top = z.amax(-1, keepdim=True)
    # Largest logit 0: where the mass sits, z + u then rounds to the last bit of u and not of the logits.
    target_top = (z + u).amax(-1, keepdim=True) - top
    z -= top
    ps = z.exp()
    sum_s = ps.sum(-1, keepdim=True)
    if ids is not None and logprobs is not None:
        logprobs.copy_((z.gather(-1, ids[:, None]) - sum_s.log()).squeeze(-1))
    z += u
    z -= target_top
    pt = z.exp_()
    sum_t = pt.sum(-1, keepdim=True)
    u -= target_top + sum_t.log() - sum_s.log()
    ps *= 1.0 / sum_s
    pt *= 1.0 / sum_t
    summand, ph = divergence.terms(ps, pt, u)
    if clip is not None:
        clip_terms(summand, ph, clip, one_sided)
    values.copy_(summand.sum(-1))
    if wants_gradient:
        logits.copy_(ph.addcmul_(ps, ph.sum(-1, keepdim=True), value=-1.0))


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """log softmax(z / temperature)[token_ids] of every token [tokens], differentiable in `hidden` [tokens, hidden]."""
    check_states(hidden, weight, bias, token_ids=token_ids)
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    num_tokens = len(hidden)
    states, ids = padded(hidden.detach(), token_ids)
    gradient = torch.empty_like(states, dtype=weight.dtype) if wants_gradient else None
    values = torch.empty(len(states), dtype=accumulation_dtype(weight), device=weight.device)

    def tile_pass(logits: Tensor, ids: Tensor, values: Tensor) -> None:
        z = logits.to(values.dtype) / temperature
        probs, normaliser = softmax_with_normaliser(z)
        values.copy_((z.gather(-1, ids[:, None]) - normaliser).squeeze(-1))
        if wants_gradient:  # d logprob / dz = one-hot - p
            logits.copy_(probs.neg_().scatter_add_(-1, ids[:, None], torch.ones_like(probs[:, :1])))

    with torch.no_grad():
        for rows, (logits,) in chunks(len(values), weight, 1, chunk_rows):
            apply_head(states[rows], weight, bias, out=logits, near=ids[rows])
            for_each_tile(tile_pass, logits, ids[rows], values[rows])
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[rows])
    return attach(hidden, values[:num_tokens], gradient, temperature)


@cache
def fused(row_pass: Callable[..., None]) -> Callable[..., None]:
    """`row_pass` as few compiled loops, for any number of rows."""
    build = torch.compile(row_pass)

    def run(*tensors: Tensor | None, **options: Any) -> None:
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        build(*tensors, **options)

    return run


class GradientInForward(torch.autograd.Function):
    """Gives values [tokens] the derivative made beside them: d values[t] / d hidden[t] = gradient[t] / temperature."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, values: Tensor, gradient: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.temperature, ctx.dtype = temperature, hidden.dtype
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * (upstream / ctx.temperature).unsqueeze(-1)).to(ctx.dtype), None, None, None


def attach(hidden: Tensor, values: Tensor, gradient: Tensor | None, temperature: float) -> Tensor:
    """`values` [tokens] of `hidden` with their gradient, of which rows beyond the tokens are left out."""
    return values if gradient is None else GradientInForward.apply(hidden, values, gradient[: len(hidden)], temperature)


def padded(*tensors: Tensor | None) -> list[Any]:
    """With rows of zeros at the end, so that products of matrices come in few sizes (`ogls.system.sizes`)."""

    def pad(tensor: Tensor) -> Tensor:
        more = rounded_up(len(tensor), tensor.device) - len(tensor)
        return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])]) if more else tensor

    return [None if tensor is None else pad(tensor) for tensor in tensors]


def softmax_with_normaliser(logits: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) and log sum exp(logits) [rows, 1]; two maxima are cheaper than a second exponential."""
    probs = torch.softmax(logits, dim=-1)
    return probs, logits.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()


def logits_and_gaps(
    student: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, near: Tensor | None, out: Tensor
) -> Tensor:
    """z_S but for a constant a row (`shift_to` the tokens `near`), and z_T - z_S, into `out` [2, rows, vocab], by one
    product; states [rows, hidden].

    Returns the indices of rows whose student is its target. All is 0 there, and rounding is all there would be: an
    optimiser that divides by the gradient's size would make full steps of it.
    """
    accurate = accumulation_dtype(weight)
    gap = target.to(accurate) - student.to(accurate)
    student = student.to(weight.dtype)
    states = torch.cat([student, gap.to(weight.dtype)])
    if near is None:
        torch.mm(states, weight.T, out=out.flatten(0, 1))
    else:
        shift = torch.cat([shift_to(near, student, weight), states.new_zeros(len(student), 1)])
        torch.addmm(shift, states, weight.T, out=out.flatten(0, 1))
    if bias is not None:
        out[0] += bias
    return (gap == 0).all(-1).nonzero().squeeze(1)


def shift_to(near: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """What makes the logits of the tokens `near` [rows] about 0 when it is added to their rows of them [rows, 1].

    Within the product, before anything is rounded: logits of 40, as trained models have them, are up to 1/8 off in
    bf16, and far less is left near a sampled token, where the mass is.
    """
    return -(hidden * weight[near]).sum(-1, keepdim=True)


def apply_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, near: Tensor | None = None) -> None:
    """hidden [rows, hidden] -> logits [rows, vocab] into `out`, in the weight's dtype; `shift_to` the tokens `near`."""
    hidden = hidden.to(weight.dtype)
    if near is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(shift_to(near, hidden, weight), hidden, weight.T, out=out)
    if bias is not None:
        out += bias


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_states(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    hidden_target: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"expected states [tokens, hidden] and a head [vocab, hidden], got {shapes}")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("expected a frozen head: no gradient is made for it, but its weight or bias requires one")
    if hidden_target is not None and hidden_target.shape != hidden.shape:
        raise ValueError(f"expected target states {list(hidden.shape)}, got {list(hidden_target.shape)}")
    if token_ids is not None and token_ids.shape != hidden.shape[:1]:
        raise ValueError(f"expected one token id a state, {len(hidden)}, got {list(token_ids.shape)}")
