"""This attention keeps the sequences of a packed row apart."""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from ogls.policy.layout import Grid, Grids, Varlen
from ogls.policy.packing import Packing

ATTENTION = "ogls_packed"


def register_attention() -> None:
    """Makes `packed_attention` known to transformers under the name `ATTENTION`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Returns the attention of every sequence of a row to itself: [1, heads, tokens, d] -> [1, tokens, heads, d].

    The signature is that of transformers' attention functions. Without a packing it is transformers' own sdpa.

    Raises:
        ValueError: the model caps its attention scores or has attention sinks, or a sequence is longer than its sliding
            window.
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("attention with soft-capping or sinks is not supported")
    if sliding_window is not None and packing.longest > sliding_window:
        raise ValueError(f"a sequence is longer than the model's sliding window of {sliding_window} tokens")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, d]
    layout = packing.layout
    by_call = isinstance(layout, Varlen)
    out = _varlen(q, k, v, layout, scaling) if by_call else _by_grids(q, k, v, layout, scaling)
    return out[None], None


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Varlen, scaling: float | None) -> Tensor:
    """Returns attention by one call of torch's flash attention; it skips what a causal mask hides."""
    from torch.nn.attention.varlen import varlen_attn

    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, norms of queries and keys leave fp32
    if layout.keys is not None:
        k, v = (Gather.apply(x, layout.keys, layout.uses, layout.use_starts) for x in (k, v))
    lengths = layout.query_starts, layout.key_starts, layout.longest_query, layout.longest_key
    out: Any = varlen_attn(q, k, v, *lengths, scale=scaling, window_size=(-1, 0), **_fewer_key_heads())
    return out


@cache
def _fewer_key_heads() -> dict[str, Any]:
    """Returns the option that allows fewer heads of keys than of queries; torch 2.11 allows it without being asked."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


class Gather(torch.autograd.Function):
    """Gather takes rows of x, some several times. Their gradients are summed in a fixed order, and in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, uses: Tensor, use_starts: Tensor) -> Tensor:
        ctx.save_for_backward(uses, use_starts)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        uses, starts = ctx.saved_tensors
        total = embedding_bag(uses, grad.flatten(1), starts, mode="sum", include_last_offset=True)
        return total.unflatten(1, grad.shape[1:]), None, None, None


def _by_grids(q: Tensor, k: Tensor, v: Tensor, layout: Grids, scaling: float | None) -> Tensor:
    roots, branches = layout.roots, layout.branches
    n = len(roots.tokens)
    qs, ks, vs = (_to_grid(x[:n], roots) for x in (q, k, v))  # [roots, longest, heads, d]
    out = [_from_grid(_attend(qs, ks, vs, None, scaling), roots)]
    if branches is not None:
        first, n = n, n + len(branches.tokens)
        qb, kb, vb = (_to_grid(x[first:n], branches) for x in (q, k, v))
        kb, vb = (torch.cat([x.index_select(0, layout.owners), b], dim=1) for x, b in ((ks, kb), (vs, vb)))
        out.append(_from_grid(_attend(qb, kb, vb, layout.mask, scaling), branches))
    if n < len(q):
        out.append(q.new_zeros(len(q) - n, *out[0].shape[1:]))
    return torch.cat(out)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Returns attention within each sequence, [sequences, longest, heads, d]; without a mask it is causal.

    Padding is on the right, so that no real query sees it. The gradient of torch's fused attention takes most of a
    step with short sequences on a CPU, so attention is written out. The pass without a gradient is written out too, so
    that student and teacher round alike.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is None:
        mask = torch.full((q.shape[2], k.shape[2]), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
    scale = q.shape[3] ** -0.5 if scaling is None else scaling
    grouped = (q * scale).reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # query heads of a key head side by side
    scores = (grouped @ k.mT).view(*q.shape[:3], -1) + mask
    out = scores.softmax(-1).view(*grouped.shape[:3], -1) @ v
    return out.reshape(q.shape).transpose(1, 2)


class _Select(torch.autograd.Function):
    """_Select takes the rows `index` of x. A row is wanted once, or as padding, so its gradient is a selection too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def _to_grid(x: Tensor, grid: Grid) -> Tensor:
    return _Select.apply(x, grid.cells, grid.tokens).unflatten(0, (-1, grid.longest))


def _from_grid(x: Tensor, grid: Grid) -> Tensor:
    return x.flatten(0, 1).index_select(0, grid.tokens)
