"""The student's entropy at each token is computed a few tokens at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ogls.loss.chunked import accumulation_dtype, apply_head, check_states, padded
from ogls.loss.tiles import chunks, for_each_tile


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
    check_states(hidden, head_weight, head_bias)
    (states,) = padded(hidden.detach())
    values = torch.empty(len(states), dtype=accumulation_dtype(head_weight), device=head_weight.device)

    def tile_pass(logits: Tensor, values: Tensor) -> None:
        z = logits.to(values.dtype) / temperature
        z -= z.amax(-1, keepdim=True)
        mass = z.exp()
        total = mass.sum(-1)
        values.copy_(total.log() - mass.mul_(z).sum(-1) / total)

    for rows, (logits,) in chunks(len(values), head_weight, 1, chunk_rows):
        apply_head(states[rows], head_weight, head_bias, out=logits)
        for_each_tile(tile_pass, logits, values[rows])
    return values[: len(hidden)]
