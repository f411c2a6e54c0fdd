"""Top-k divergences take the likeliest tokens singly, the rest as one bucket.

    S = top-k of the student, or its union with the top-k of the target        p_tail = sum of p_v over v not in S
    D_S(target, student) = sum over v in S of s(p_T,v, p_S,v) + s(p_T,tail, p_S,tail)

D_S <= D for an f-divergence, with equality where S is the whole vocabulary. S is taken as a constant. The derivative of
`ogls.loss.divergence` goes through the tail, too: with ph = p_S ds/dp_S of each of these summands,

    dD/dz_v = ph_v - p_S,v sum ph  for v in S        dD/dz_v = p_S,v (ph_tail / p_S,tail - sum ph)  else

Source: SDPO, arXiv 2601.20802, with k = 100 on the student's support.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ogls.loss.divergence import Divergence, clip_terms, softmax_with_normaliser


@dataclass(frozen=True)
class TopK:
    """TopK sums a divergence over the likeliest tokens and over one bucket that holds all others.

    Args:
        k: number of likeliest tokens
        of: distributions whose likeliest tokens are taken: ``student``, or ``union`` for those of student and target
    """

    k: int = 100
    of: Literal["student", "union"] = "student"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"TopK needs k >= 1, got k={self.k}")


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
    """Makes all row passes over some tokens, as `ogls.loss.chunked.divergence_rows` does without a support."""
    z, u = logits.to(values.dtype) / temperature, gaps.to(values.dtype) / temperature
    z -= z.amax(-1, keepdim=True)
    k = min(support.k, z.shape[-1])
    inside = z.topk(k, sorted=False).indices
    ps, student_normaliser = softmax_with_normaliser(z)
    if ids is not None and logprobs is not None:
        logprobs.copy_((z.gather(-1, ids[:, None]) - student_normaliser).squeeze(-1))
    z += u
    pt, target_normaliser = softmax_with_normaliser(z)
    u -= target_normaliser - student_normaliser
    if support.of == "union":
        inside = torch.cat([inside, z.topk(k, sorted=False).indices], -1)
    p, q, gap = (take(x, inside, k) for x in (ps, pt, u))
    ps.scatter_(-1, inside, 0.0)
    pt.scatter_(-1, inside, 0.0)
    tail_p, tail_q = ps.sum(-1, keepdim=True), pt.sum(-1, keepdim=True)
    value, inner, factor = bucketed(*(p, q, gap, tail_p, tail_q), divergence=divergence, clip=clip, one_sided=one_sided)
    values.copy_(value)
    if wants_gradient:
        logits.copy_(ps.mul_(factor).scatter_add_(-1, inside, inner))


def bucketed(
    p: Tensor,
    q: Tensor,
    gap: Tensor,
    tail_p: Tensor,
    tail_q: Tensor,
    *,
    divergence: Divergence,
    clip: float | None,
    one_sided: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns D_S [rows], dD_S/dz of the tokens of S [rows, k], and (dD_S/dz) / p_S [rows, 1] of all others.

    Args:
        p: probabilities of the tokens of S under the student [rows, k]
        q: probabilities of the tokens of S under the target [rows, k]
        gap: log q - log p [rows, k]
        tail_p: probability of all other tokens under the student [rows, 1]
        tail_q: probability of all other tokens under the target [rows, 1]
        divergence: divergence D
        clip: bound of each summand, or None
        one_sided: whether the bound is from above alone
    """
    tiny = torch.finfo(p.dtype).tiny
    tail_gap = tail_q.clamp(min=tiny).log() - tail_p.clamp(min=tiny).log()
    summand, ph = divergence.terms(*(torch.cat(x, -1) for x in ((p, tail_p), (q, tail_q), (gap, tail_gap))))
    if clip is not None:
        clip_terms(summand, ph, clip, one_sided)
    total = ph.sum(-1, keepdim=True)
    ph, tail_ph = ph.split([p.shape[-1], 1], -1)
    return summand.sum(-1), ph - p * total, tail_ph / tail_p.clamp(min=tiny) - total


def take(x: Tensor, inside: Tensor, k: int) -> Tensor:
    """Returns x at the indices `inside` [rows, k or 2k], and 0 where one of the second k repeats one of the first."""
    taken = x.gather(-1, inside)
    if inside.shape[-1] > k:
        first = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, inside[:, :k], True)
        taken[:, k:].masked_fill_(first.gather(-1, inside[:, k:]), 0.0)
    return taken
