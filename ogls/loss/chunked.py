"""The chunked loss compares states without holding the logits of all tokens.

Student and target share the head W, so z_T - z_S = W (h_T - h_S): the second product takes the *difference* of
the hidden states. Rounding of low-precision logits is then common to both sides, and a small divergence keeps its
gradient. The gradient with respect to the student's states is taken in the forward pass, while the logits are there:

    z_S = h_S Wᵀ + b        u = (h_T - h_S) Wᵀ        dh = (dD/dz_S) W        three matrix products per chunk

A head that is trained gets its gradient in the backward pass, which makes the logits of each chunk once more.

The first two are one product of twice as many rows. The products run on chunks of tokens. The row passes (softmax,
divergence, gradient) run on tiles of a few rows that stay in the cache (`ogls.loss.tiles`). For the known divergences
one function in C++ makes all of them (`ogls.loss.cpu_rows`), on a GPU one kernel (`ogls.loss.triton_rows`). The
gradient overwrites the logits. Row statistics are fp32, or fp64 under a fp64 head.

A target of another model has a head of its own, and nothing in common with the student's: z_S and z_T are then two
products, of states that may have different widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ogls.loss import cpu_rows
from ogls.loss.divergence import Divergence, clip_terms, softmax_with_normaliser
from ogls.loss.tiles import chunks, for_each_tile
from ogls.loss.topk import TopK, topk_rows
from ogls.system.sizes import rounded_up

Head = tuple[Tensor, Tensor | None]
"""Weight [vocab, hidden] and bias [vocab] of an output head."""


def chunked_divergence(
    hidden_student: Tensor,
    hidden_target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    divergence: Divergence,
    *,
    head_target: Head | None = None,
    support: TopK | None = None,
    temperature: float = 1.0,
    clip: float | None = None,
    one_sided: bool = False,
    token_ids: Tensor | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns D(softmax(z_T / temperature), softmax(z_S / temperature)) of every token, in nats.

    It is differentiable in `hidden_student`, and in a head that requires a gradient as far as it makes the student's
    logits: no gradient flows to the target.

    Args:
        hidden_student: states of the student [tokens, hidden]
        hidden_target: states of the target [tokens, hidden]
        weight: weight of the output head [vocab, hidden]
        bias: bias of the output head [vocab]; None where it has none
        divergence: divergence D
        head_target: weight and bias of the target's own frozen head, with as many rows; None is the student's
        support: tokens that are taken singly (`ogls.loss.topk`); None takes the whole vocabulary
        temperature: divisor of the logits of both sides
        clip: bound of each vocabulary summand of D (`clip_terms`); None leaves them free
        one_sided: whether the bound is from above alone
        token_ids: tokens [tokens] whose log-probabilities are returned too; None returns none
        chunk_rows: tokens per chunk; None follows the byte budget of `ogls.loss.tiles`

    Returns:
        The divergences [tokens], and the student's detached log-probabilities [tokens] of `token_ids` at the same
        temperature, or None.

    Raises:
        ValueError: shapes do not fit.
    """
    row_passes = passes(
        divergence,
        support,
        weight.device,
        weight.dtype,
        temperature=temperature,
        clip=clip,
        one_sided=one_sided,
        wants_gradient=torch.is_grad_enabled() and hidden_student.requires_grad,
    )
    values, *logprobs = by_chunks(
        row_passes,
        hidden_student,
        weight,
        bias,
        hidden_target=hidden_target,
        head_target=head_target,
        token_ids=token_ids,
        num_outputs=1 if token_ids is None else 2,
        temperature=temperature,
        chunk_rows=chunk_rows,
    )
    return values, logprobs[0] if logprobs else None


def by_chunks(
    row_passes: Callable[..., None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    hidden_target: Tensor | None = None,
    head_target: Head | None = None,
    token_ids: Tensor | None = None,
    num_outputs: int = 1,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> list[Tensor]:
    """Returns numbers per token that are made from its logits, some tokens at a time.

    Only the first of them has a gradient, in `hidden` and in a head that requires one. All other arguments are those of
    `chunked_divergence`.

    Args:
        row_passes: function of the logits of some tokens, of their gaps to the target's logits where there is a target,
            of the first output, of the token ids or None, and of the other outputs. It fills the outputs and overwrites
            the logits by d first output / dz, where z = logits / temperature.
        hidden: states [tokens, hidden] whose logits are made
        num_outputs: count of numbers per token

    Raises:
        ValueError: shapes do not fit.
    """
    check_states(hidden, weight, bias, hidden_target=hidden_target, head_target=head_target, token_ids=token_ids)
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    states, targets, ids = padded(hidden.detach(), hidden_target, token_ids)
    gradient = torch.empty_like(states, dtype=weight.dtype) if wants_gradient else None
    dtype = accumulation_dtype(weight)
    outputs = [torch.empty(len(states), dtype=dtype, device=weight.device) for _ in range(num_outputs)]

    def swept(outputs: list[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        for rows, buffers in chunks(len(states), weight, 1 if targets is None else 2, chunk_rows):
            near, reached = None if ids is None else ids[rows], None
            if targets is None:
                apply_head(states[rows], weight, bias, out=buffers[0], near=near)
            else:
                reached = logits_and_gaps(states[rows], targets[rows], weight, bias, near, buffers, head_target)
            first, *others = (output[rows] for output in outputs)
            row_passes(*buffers, first, near, *others)
            yield rows, buffers[0], reached

    def of_head(upstream: Tensor) -> tuple[Tensor, Tensor]:
        of_weight = torch.zeros_like(weight, dtype=dtype)
        of_bias, scale = (weight.new_zeros(n, dtype=dtype) for n in (len(weight), len(states)))
        scale[: len(hidden)] = upstream / temperature
        for rows, derivative, reached in swept([torch.empty_like(output) for output in outputs]):
            factor = scale[rows] if reached is None else scale[rows].masked_fill(reached, 0.0)
            derivative.mul_(factor[:, None])
            of_weight += derivative.T @ states[rows].to(derivative.dtype)
            of_bias += derivative.sum(0)
        return of_weight, of_bias

    with torch.no_grad():
        for rows, derivative, reached in swept(outputs):
            if gradient is not None:
                torch.mm(derivative, weight, out=gradient[rows])
                if reached is not None:
                    gradient[rows].masked_fill_(reached[:, None], 0.0)
    first, *others = (output[: len(hidden)] for output in outputs)
    value = attach(hidden, first, gradient, temperature)
    if wants_gradient and weight.requires_grad:
        value = HeadGradient.apply(value, weight, bias, of_head)
    return [value, *others]


def passes(
    divergence: Divergence,
    support: TopK | None,
    device: torch.device,
    dtype: torch.dtype,
    **options: float | bool | None,
) -> Callable[..., None]:
    """Returns `divergence_rows`, or `topk_rows`, for all rows of a chunk by the quickest way for such logits."""
    if support is not None:
        if device.type == "cuda" and support.of == "student":
            from ogls.loss import triton_topk  # Triton comes with torch for GPUs only

            return partial(triton_topk.topk_rows, divergence=divergence, support=support, **options)
        return partial(for_each_tile, partial(topk_rows, divergence=divergence, support=support, **options))
    if device.type == "cuda":
        from ogls.loss import triton_rows

        if type(divergence) in triton_rows.KINDS:
            return partial(triton_rows.divergence_rows, divergence=divergence, **options)
    if cpu_rows.knows(divergence, device, dtype):
        of_tile = partial(quick_rows, divergence=divergence, **options)
        return partial(for_each_tile, of_tile, tile_bytes=cpu_rows.TILE_BYTES)
    return partial(for_each_tile, partial(divergence_rows, divergence=divergence, **options))


def quick_rows(
    logits: Tensor,
    gaps: Tensor,
    values: Tensor,
    ids: Tensor | None = None,
    logprobs: Tensor | None = None,
    **options: Any,
) -> None:
    """Makes the passes of `divergence_rows` by `ogls.loss.cpu_rows`, and by itself over the rows that those leave."""
    cpu_rows.divergence_rows(logits, gaps, values, ids, logprobs, **options)
    left = values.isnan().nonzero().squeeze(-1)
    if len(left):
        tensors = logits, gaps, values, ids, logprobs
        rows: list[Any] = [None if tensor is None else tensor[left] for tensor in tensors]
        divergence_rows(*rows, **options)
        for tensor, made in zip(tensors, rows, strict=True):
            if tensor is not None and made is not None:
                tensor[left] = made


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
    """Makes all row passes over some tokens: fills `values` and `logprobs`, and leaves dD/dz in `logits`.

    Args:
        logits: z_S [rows, vocab], overwritten by dD/dz, where z = z_S / temperature
        gaps: z_T - z_S [rows, vocab], overwritten
        values: divergences [rows], to be filled
        ids: tokens [rows] whose log-probabilities are wanted, or None
        logprobs: log-probabilities [rows] of `ids` under the student, to be filled, or None
        divergence: divergence D
        temperature: divisor of the logits of both sides
        clip: bound of each vocabulary summand, or None
        one_sided: whether the bound is from above alone
        wants_gradient: whether dD/dz is made
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
    """Returns log softmax(z / temperature)[token_ids] of every token [tokens], differentiable in `hidden` and head.

    Args:
        hidden: states that predict each token [tokens, hidden]
        weight: weight of the output head [vocab, hidden]
        bias: bias of the output head [vocab]; None where it has none
        token_ids: tokens [tokens] whose log-probabilities are returned
        temperature: divisor of the logits
        chunk_rows: tokens per chunk; None follows the byte budget of `ogls.loss.tiles`

    Raises:
        ValueError: shapes do not fit.
    """
    row_passes = partial(
        logprob_rows, temperature=temperature, wants_gradient=torch.is_grad_enabled() and hidden.requires_grad
    )
    (logprobs,) = by_chunks(
        partial(for_each_tile, row_passes),
        hidden,
        weight,
        bias,
        token_ids=token_ids,
        temperature=temperature,
        chunk_rows=chunk_rows,
    )
    return logprobs


def logprob_rows(logits: Tensor, values: Tensor, ids: Tensor, *, temperature: float, wants_gradient: bool) -> None:
    """Fills `values` [rows] with the log-probabilities of `ids`, and leaves d logprob/dz in `logits`."""
    z = logits.to(values.dtype) / temperature
    probs, normaliser = softmax_with_normaliser(z)
    values.copy_((z.gather(-1, ids[:, None]) - normaliser).squeeze(-1))
    if wants_gradient:  # d logprob / dz = one-hot - p
        logits.copy_(probs.neg_().scatter_add_(-1, ids[:, None], torch.ones_like(probs[:, :1])))


class GradientInForward(torch.autograd.Function):
    """This autograd function gives values [tokens] a derivative that was computed together with them.

    d values[t] / d hidden[t] = gradient[t] / temperature
    """

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


class HeadGradient(torch.autograd.Function):
    """This autograd function lets values [tokens] pass, and gives the head that made their logits its gradient.

    Args of `apply`: values, weight, bias or None, and a function from the values' gradient to those of weight and bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        of_head: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        ctx.of_head, ctx.biased = of_head, bias is not None
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        of_weight, of_bias = ctx.of_head(upstream)
        return upstream, of_weight, of_bias if ctx.biased else None, None


def attach(hidden: Tensor, values: Tensor, gradient: Tensor | None, temperature: float) -> Tensor:
    """Returns `values` [tokens] with their gradient in `hidden`; rows of `gradient` beyond the tokens are left out."""
    return values if gradient is None else GradientInForward.apply(hidden, values, gradient[: len(hidden)], temperature)


def padded(*tensors: Tensor | None) -> list[Any]:
    """Returns the tensors with rows of zeros at the end, so that matrices have few sizes (`ogls.system.sizes`)."""

    def pad(tensor: Tensor) -> Tensor:
        more = rounded_up(len(tensor), tensor.device) - len(tensor)
        return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])]) if more else tensor

    return [None if tensor is None else pad(tensor) for tensor in tensors]


def logits_and_gaps(
    student: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    near: Tensor | None,
    out: Tensor,
    head_target: Head | None = None,
) -> Tensor:
    """Writes z_S and z_T - z_S, each up to a constant per row, into `out` [2, rows, vocab] by one product.

    The states are [rows, hidden]. The constant brings the logits of the tokens `near` to about 0 (`shift_to`); without
    them it is 0. A target with a head of its own takes a product of its own.

    Returns for each row whether student and target are equal [rows]. The gradient has to be exactly 0 there: an
    optimiser that divides by the gradient's size would make full steps of mere rounding.
    """
    if head_target is not None:
        apply_head(student, weight, bias, out=out[0], near=near)
        apply_head(target, *head_target, out=out[1], near=near)
        out[1] -= out[0]
        return torch.zeros(len(student), dtype=torch.bool, device=student.device)
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
    return (gap == 0).all(-1)


def shift_to(near: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns a number per row [rows, 1] that, added to all logits of the row, brings that of its token `near` to 0.

    It is added within the product, before anything is rounded. Logits of 40, as trained models have them, are up to 1/8
    off in bf16; those near a sampled token, where the probability is, are then small and far less off.
    """
    return -(hidden * weight[near]).sum(-1, keepdim=True)


def apply_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, near: Tensor | None = None) -> None:
    """Writes the logits [rows, vocab] of `hidden` [rows, hidden] into `out`, in the head's dtype.

    With tokens `near` [rows], they are moved by a constant per row (`shift_to`).
    """
    hidden = hidden.to(weight.dtype)
    if near is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(shift_to(near, hidden, weight), hidden, weight.T, out=out)
    if bias is not None:
        out += bias


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype of sums over rows: fp64 for a fp64 tensor, fp32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_states(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    hidden_target: Tensor | None = None,
    head_target: Head | None = None,
    token_ids: Tensor | None = None,
) -> None:
    """Raises ValueError where shapes do not fit."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"expected states [tokens, hidden] and a head [vocab, hidden], got {shapes}")
    if head_target is not None:
        if hidden_target is None or len(head_target[0]) != len(weight):
            raise ValueError(
                f"expected states and a head of {len(weight)} rows for the target, got {len(head_target[0])}"
            )
        check_states(hidden_target, *head_target)
        if len(hidden_target) != len(hidden):
            raise ValueError(f"expected a target state for each of {len(hidden)}, got {len(hidden_target)}")
    elif hidden_target is not None and hidden_target.shape != hidden.shape:
        raise ValueError(f"expected target states {list(hidden.shape)}, got {list(hidden_target.shape)}")
    if token_ids is not None and token_ids.shape != hidden.shape[:1]:
        raise ValueError(f"expected one token id per state, {len(hidden)}, got {list(token_ids.shape)}")
