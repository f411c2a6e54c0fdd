"""Every token gets the largest alpha whose target stays within a KL budget.

pi_alpha ∝ p0 exp(alpha Delta) is an exponential family with log-normaliser L(alpha) = log E_p0[exp(alpha Delta)]:

    KL(pi_alpha || p0) = alpha E_alpha[Delta] - L(alpha)        d/dalpha KL = alpha Var_alpha(Delta) >= 0
    KL(pi_alpha || p0) <= alpha² (max Delta - min Delta)² / 8   since Var <= range² / 4 (Hoeffding's lemma)

So alpha = sqrt(8 epsilon) / range is always within the budget, and bisection goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ogls.loss.chunked import Head, accumulation_dtype, apply_head
from ogls.loss.tiles import chunks, for_each_tile

HALVINGS = 20
"""The bisection halves its interval this many times."""


@torch.no_grad()
def largest_alpha(
    anchor: Float[Tensor, "tokens hidden"],
    direction: Float[Tensor, "tokens hidden"],
    head: Head,
    alpha_max: float,
    epsilon: float,
) -> Float[Tensor, " tokens"]:
    """Returns for each token the largest alpha in [0, alpha_max] with KL(pi_alpha || p0) <= epsilon.

    p0 = softmax(W anchor + b) and Delta = W direction. Where the budget binds, the result is below the exact root by at
    most alpha_max / 2^20.

    Args:
        anchor: states before steering
        direction: states to steer along
        head: weight and bias of the output head
        alpha_max: upper bound of alpha
        epsilon: KL budget per token, in nats
    """
    weight, bias = head
    alphas = torch.full((len(anchor),), alpha_max, dtype=accumulation_dtype(weight), device=weight.device)
    steered = direction.any(-1).nonzero().squeeze(1)  # elsewhere every alpha is the same
    found = alphas[steered]
    row_passes = _passes(weight.device, alpha_max=alpha_max, epsilon=epsilon)
    for rows, (logits, deltas) in chunks(len(steered), weight, 2, None):
        apply_head(anchor[steered[rows]], weight, bias, out=logits)
        apply_head(direction[steered[rows]], weight, None, out=deltas)
        row_passes(logits, deltas, found[rows])
    return alphas.index_copy_(0, steered, found)


def _passes(device: torch.device, **options: float) -> Callable[..., None]:
    """Returns what fills the alphas of a chunk, from its logits and deltas, by the quickest way for `device`."""
    if device.type == "cuda":
        from ogls.loss import triton_alpha  # Triton comes with torch for GPUs only

        return partial(triton_alpha.bisect_rows, halvings=HALVINGS, **options)
    return partial(for_each_tile, partial(bisect_tile, **options))


def bisect_tile(logits: Tensor, deltas: Tensor, alphas: Tensor, *, alpha_max: float, epsilon: float) -> None:
    """Fills `alphas` [rows] with the largest alphas, from the logits of p0 and Delta, both [rows, vocab]."""
    log_p0, delta = logits.to(alphas.dtype).log_softmax(-1), deltas.to(alphas.dtype)
    spread = delta.amax(-1) - delta.amin(-1)
    high = torch.full_like(alphas, alpha_max)
    low = torch.minimum(high, (8.0 * epsilon) ** 0.5 / spread.clamp(min=torch.finfo(alphas.dtype).tiny))
    low = torch.where(tilted_kl(log_p0, delta, high) <= epsilon, high, low)
    for _ in range(HALVINGS):
        if torch.equal(low, high):
            break
        middle = (low + high) / 2
        within = tilted_kl(log_p0, delta, middle) <= epsilon
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    alphas.copy_(low)


def tilted_kl(
    log_p0: Float[Tensor, "rows vocab"], delta: Float[Tensor, "rows vocab"], alpha: Float[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Returns KL(pi_alpha || p0) in nats, with one alpha per row; `log_p0` is normalised."""
    tilted = log_p0 + alpha[:, None] * delta
    return alpha * (tilted.softmax(-1) * delta).sum(-1) - tilted.logsumexp(-1)
