"""The student's entropy at each token is computed a few tokens at a time."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ogls.loss.chunked import by_chunks
from ogls.loss.tiles import for_each_tile


@torch.no_grad()
def student_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    head_bias: Float[Tensor, " vocab"] | None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Float[Tensor, " tokens"]:
    """Returns the entropy of softmax(logits / temperature) of every token, in nats and without a gradient.

        H = log sum_v e^z_v - sum_v p_v z_v        z = (W hidden + b) / temperature, less its largest entry

    Args:
        hidden: final-norm states that predict each token
        head_weight: weight of the frozen output head
        head_bias: bias of the frozen output head; None where it has none
        temperature: divisor of the logits
        chunk_rows: tokens per product with the head; None follows the byte budget of `ogls.loss.tiles`
    """
    row_passes = partial(for_each_tile, partial(entropy_rows, temperature=temperature))
    (entropies,) = by_chunks(row_passes, hidden, head_weight, head_bias, chunk_rows=chunk_rows)
    return entropies


def entropy_rows(logits: Tensor, values: Tensor, ids: None, *, temperature: float) -> None:
    """Fills `values` [rows] with the entropies."""
    z = logits.to(values.dtype) / temperature
    z -= z.amax(-1, keepdim=True)
    mass = z.exp()
    total = mass.sum(-1)
    values.copy_(total.log() - mass.mul_(z).sum(-1) / total)
