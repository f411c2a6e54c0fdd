"""The flash attention that torch has for GPUs only, written out for a CPU and for one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

CALLS: list[dict[str, Any]] = []


def _sequences(q: Tensor, k: Tensor, v: Tensor, *starts: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    q_starts, k_starts = (s.tolist() for s in starts)
    for i in range(len(q_starts) - 1):
        yield (
            q[q_starts[i] : q_starts[i + 1]],
            k[k_starts[i] : k_starts[i + 1]],
            v[k_starts[i] : k_starts[i + 1]],
        )


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[heads, queries, keys]; causal from the bottom right: the last query of a sequence sees all of its keys."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + len(k) - len(q))
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool = False,
    scale: float | None = None, window_size: Any = None, enable_gqa: bool = False, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert causal
    assert window_size == [-1, 0]
    assert enable_gqa
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert q.dtype == k.dtype == v.dtype
    CALLS.append({"q": cu_q.diff().tolist(), "k": cu_k.diff().tolist()})
    scale, groups = q.shape[2] ** -0.5 if scale is None else scale, q.shape[1] // k.shape[1]
    outs = []
    for one_q, one_k, one_v in _sequences(q, k, v, cu_q, cu_k):
        probabilities = _probabilities(one_q, one_k.repeat_interleave(groups, 1), scale)
        outs.append(torch.einsum("hqk,khd->qhd", probabilities, one_v.repeat_interleave(groups, 1)))
    return torch.cat(outs), q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int,
    max_k: int, causal: bool, rng: Tensor, scale: float | None = None, window_size: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scale, groups = q.shape[2] ** -0.5 if scale is None else scale, q.shape[1] // k.shape[1]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    outputs = grad.split(cu_q.diff().tolist())
    for (one_q, one_k, one_v), g in zip(_sequences(q, k, v, cu_q, cu_k), outputs, strict=True):
        wide_k, wide_v = (x.repeat_interleave(groups, 1) for x in (one_k, one_v))
        p = _probabilities(one_q, wide_k, scale)
        dp = torch.einsum("qhd,khd->hqk", g, wide_v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dk, dv = torch.einsum("hqk,qhd->khd", ds, one_q), torch.einsum("hqk,qhd->khd", p, g)
        summed = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))  # over the query heads of a key head
        found.append((torch.einsum("hqk,khd->qhd", ds, wide_k), *summed))  # pyright: ignore[reportArgumentType]
    dq, dk, dv = (torch.cat(parts) for parts in zip(*found, strict=True))
    return dq, dk, dv


varlen._varlen_attn.register_kernel("cpu")(_forward)
varlen._varlen_attn_backward.register_kernel("cpu")(_backward)
