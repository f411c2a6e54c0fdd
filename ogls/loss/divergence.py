"""Divergences between target and student, each by its formula and its true derivative.

Written in terms of the student's probabilities p_S, the target's p_T and u = log p_T - log p_S, all of one token over
the vocabulary. The student's logits z_S enter only through p_S = softmax(z_S), so with a divergence D = sum_v s_v

    ph_v = p_S,v * ds_v / dp_S,v        dD/dz_S = ph - p_S * sum_v ph_v

and a class that returns (s, ph) is all that a new divergence needs. `ph` has to be the derivative itself, not the
derivative up to a constant: where a clip binds on single entries, a constant no longer cancels in the sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

# exp(u) overflows fp32 beyond 88; above this, log(1 - b + b e^u) = log b + u to the last digit.
LARGE = 80.0


def mixture_ratio(u: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """m / p_S = 1 - weight + weight e^u with u at most LARGE, and log m - log p_S for any u; 1 and 0 at u = 0, exactly.

    m = (1 - weight) p_S + weight p_T. By exp and log: expm1 and log1p are several times as slow on a CPU, for digits
    that the sums over v do not keep.
    """
    if weight == 0.0:
        return torch.ones_like(u), torch.zeros_like(u)
    low = u.clamp(max=LARGE)
    ratio = torch.lerp(u.new_ones(()), low.exp(), weight)
    return ratio, ratio.log().add_(u - low)


class Divergence(ABC):
    """D(target, student) of one next-token distribution, as a sum over the vocabulary."""

    @abstractmethod
    def terms(self, ps: Tensor, pt: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Summands s and ph = p_S ds/dp_S, both new tensors of the shape [..., vocab] of all three arguments."""


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(target || student) = sum_v p_T u. The student is pulled to cover all of the target."""

    def terms(self, ps: Tensor, pt: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return pt * u, -pt


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || target) = -sum_v p_S u. The student leaves what the target finds unlikely."""

    def terms(self, ps: Tensor, pt: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        summand = -ps * u
        return summand, summand + ps


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """JSD = beta KL(target || m) + (1 - beta) KL(student || m), m = (1 - beta) p_S + beta p_T, 0 < beta < 1.

    Lies in [0, ln 2] at beta = 1/2 (GKD, arXiv 2306.13649, equation 1, with teacher and target in one role).
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(f"JensenShannon needs 0 < beta < 1, got beta={self.beta}")

    def terms(self, ps: Tensor, pt: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        _, k = mixture_ratio(u, self.beta)
        ph = ps * k
        ph *= self.beta - 1.0
        return torch.addcmul(ph, pt, u - k, value=self.beta), ph


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(target || m) with m = (1 - skew) p_S + skew p_T, 0 <= skew < 1: a forward KL bounded by -log(skew).

    skew = 0 is ForwardKL (DistiLLM, arXiv 2402.03898, section 3.1).
    """

    skew: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.skew < 1.0:
            raise ValueError(f"SkewKL needs 0 <= skew < 1, got skew={self.skew}")

    def terms(self, ps: Tensor, pt: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        ratio, k = mixture_ratio(u, self.skew)
        ph = pt / ratio
        ph *= self.skew - 1.0
        return pt * (u - k), ph


def clip_terms(summand: Tensor, ph: Tensor, clip: float, one_sided: bool) -> None:
    """Clamp each vocabulary summand to [-clip, clip], or to at most clip when `one_sided`, in place.

    Where the clamp binds the summand no longer depends on the student, so its ph becomes zero: the exact derivative of
    the clamped sum. The one-sided form (OPSD's released code) keeps all negative summands and can therefore reverse the
    gradient; the symmetric one is OGLS-SD's.
    """
    binds = summand > clip if one_sided else summand.abs() > clip
    ph.masked_fill_(binds, 0.0)
    summand.clamp_(max=clip) if one_sided else summand.clamp_(-clip, clip)
