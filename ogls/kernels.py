"""The chunked loss: hidden states in, weighted sums out, the logits of all tokens never in memory at once.

Student and target share the frozen head W, so z_T - z_S = W (h_T - h_S): the second GEMM is applied to the *difference*
of the hidden states. Rounding of low-precision logits then is common to both sides and a small divergence keeps its
gradient. That gradient with respect to the student's states is taken in the forward pass, while the logits are there:

    z_S = h_S Wᵀ + b        u = (h_T - h_S) Wᵀ        dh = (dD/dz_S) W        three GEMMs a chunk

The GEMMs run on chunks of tokens, the row passes (softmax, divergence, gradient) on tiles of a few rows that stay in
the cache (see `blocking`); the gradient overwrites the logits. Row statistics are fp32 (fp64 under a fp64 head).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ogls.blocking import chunks, for_each_tile
from ogls.divergence import Divergence, clip_terms

DIAGNOSTIC_ROWS = 32  # tokens at a time; about ten fp32 rows of the vocabulary are alive for each


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
) -> tuple[Tensor, Tensor | None]:
    """D(softmax(z_T / temperature), softmax(z_S / temperature)) of every token, differentiable in `hidden_student`.

    hidden_student, hidden_target [tokens, hidden]; weight [vocab, hidden] and bias [vocab] of the frozen head. No
    gradient flows to the target. `clip` bounds each vocabulary summand (see `clip_terms`). `chunk_rows` overrides the
    byte budget.

    Returns the divergences [tokens] and, when `token_ids` [tokens] are given, the student's detached log-probs of those
    tokens at the same temperature.
    """
    check_states(hidden_student, weight, bias, hidden_target=hidden_target, token_ids=token_ids)
    wants_gradient = torch.is_grad_enabled() and hidden_student.requires_grad
    gradient = torch.empty_like(hidden_student, dtype=weight.dtype) if wants_gradient else None
    values = torch.empty(len(hidden_student), dtype=accumulation_dtype(weight), device=weight.device)
    logprobs = None if token_ids is None else torch.empty_like(values)
    tile_pass = partial(
        divergence_tile,
        divergence=divergence,
        temperature=temperature,
        clip=clip,
        one_sided=one_sided,
        wants_gradient=wants_gradient,
    )
    with torch.no_grad():
        for rows, (logits, gaps) in chunks(len(values), weight, 2, chunk_rows):
            student = hidden_student[rows]
            apply_head(student, weight, bias, out=logits)
            states_gap = hidden_target[rows].to(values.dtype) - student.to(values.dtype)
            apply_head(states_gap, weight, None, out=gaps)
            ids = (None, None) if token_ids is None or logprobs is None else (token_ids[rows], logprobs[rows])
            for_each_tile(tile_pass, logits, gaps, values[rows], *ids)
            # Where the student is its target all is 0, and rounding is all there would be: an optimiser that divides
            # by the gradient's size would make full steps of it.
            reached = (states_gap == 0).all(-1)
            values[rows].masked_fill_(reached, 0.0)
            logits.masked_fill_(reached[:, None], 0.0)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[rows])
    return attach(hidden_student, values, gradient, temperature), logprobs


def divergence_tile(
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
    """All row passes over a few tokens: fills `values` and `logprobs` [rows], and leaves dD/dz in `logits`.

    logits = z_S and gaps = z_T - z_S [rows, vocab], both used up; z = logits / temperature.
    """
    z, u = logits.to(values.dtype), gaps.to(values.dtype)
    if temperature != 1.0:
        z, u = z / temperature, u / temperature
    # Largest logit 0: where the mass sits, z + u then rounds to the last bit of u and not of the logits.
    z -= z.amax(-1, keepdim=True)
    ps, student_normaliser = softmax_with_normaliser(z)
    if ids is not None and logprobs is not None:
        logprobs.copy_((z.gather(-1, ids[:, None]) - student_normaliser).squeeze(-1))
    z += u
    pt, target_normaliser = softmax_with_normaliser(z)
    u -= target_normaliser - student_normaliser
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
    gradient = torch.empty_like(hidden, dtype=weight.dtype) if wants_gradient else None
    values = torch.empty(len(hidden), dtype=accumulation_dtype(weight), device=weight.device)

    def tile_pass(logits: Tensor, ids: Tensor, values: Tensor) -> None:
        z = logits.to(values.dtype) / temperature
        probs, normaliser = softmax_with_normaliser(z)
        values.copy_((z.gather(-1, ids[:, None]) - normaliser).squeeze(-1))
        if wants_gradient:  # d logprob / dz = one-hot - p
            logits.copy_(probs.neg_().scatter_add_(-1, ids[:, None], torch.ones_like(probs[:, :1])))

    with torch.no_grad():
        for rows, (logits,) in chunks(len(values), weight, 1, chunk_rows):
            apply_head(hidden[rows], weight, bias, out=logits)
            for_each_tile(tile_pass, logits, token_ids[rows], values[rows])
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[rows])
    return attach(hidden, values, gradient, temperature)


@torch.no_grad()
def diagnostics(
    hidden_student: Tensor,
    hidden_anchor: Tensor,
    hidden_direction: Tensor,
    alpha: float,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float = 1.0,
    marker_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """How far target, anchor and student are apart: means over the tokens given (some hundreds do; none give {}).

    p0 = softmax of the anchor's logits, Delta = W direction, target ∝ p0 exp(alpha Delta), everything / temperature.
    `delta_std` is the standard deviation of Delta under p0, `delta_range` max - min over the vocabulary, and
    `hoeffding_bound` = alpha² range² / 8 >= KL(target || anchor). In nats; masses and `tv_target_anchor` in [0, 1].
    """
    check_states(hidden_student, weight, bias, hidden_target=hidden_anchor)
    found: dict[str, Tensor] = {}
    accurate = accumulation_dtype(weight)
    for rows, (student, gap, steer) in chunks(len(hidden_student), weight, 3, DIAGNOSTIC_ROWS):
        apply_head(hidden_student[rows], weight, bias, out=student)
        apply_head(hidden_anchor[rows].to(accurate) - hidden_student[rows].to(accurate), weight, None, out=gap)
        apply_head(hidden_direction[rows], weight, None, out=steer)
        z, delta = student.to(accurate) / temperature, steer.to(accurate) / temperature
        z0 = z + gap.to(accurate) / temperature
        log_student, log_anchor, log_target = (x.log_softmax(-1) for x in (z, z0, z0 + alpha * delta))
        student_p, anchor_p, target_p = log_student.exp(), log_anchor.exp(), log_target.exp()
        spread = delta.amax(-1) - delta.amin(-1)
        centred = delta - (anchor_p * delta).sum(-1, keepdim=True)
        values = {
            "kl_target_student": (target_p * (log_target - log_student)).sum(-1),
            "kl_target_anchor": (target_p * (log_target - log_anchor)).sum(-1),
            "hoeffding_bound": (alpha * spread) ** 2 / 8,
            "tv_target_anchor": (target_p - anchor_p).abs().sum(-1) / 2,
            "target_entropy": -(target_p * log_target).sum(-1),
            "student_entropy": -(student_p * log_student).sum(-1),
            "delta_std": (anchor_p * centred**2).sum(-1).sqrt(),
            "delta_range": spread,
        }
        if marker_ids:
            values["marker_mass_target"] = target_p[:, list(marker_ids)].sum(-1)
            values["marker_mass_student"] = student_p[:, list(marker_ids)].sum(-1)
        for name, value in values.items():
            found[name] = found.get(name, value.new_zeros(())) + value.sum()
    return {name: total.item() / len(hidden_student) for name, total in found.items()}


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
    return values if gradient is None else GradientInForward.apply(hidden, values, gradient, temperature)


def softmax_with_normaliser(logits: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) and log sum exp(logits) [rows, 1]; two maxima are cheaper than a second exponential."""
    probs = torch.softmax(logits, dim=-1)
    return probs, logits.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()


def apply_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """hidden [rows, hidden] -> logits [rows, vocab] into `out`, in the weight's dtype."""
    hidden = hidden.to(weight.dtype)
    torch.mm(hidden, weight.T, out=out)
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
