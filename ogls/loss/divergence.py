"""Divergences compare target and student, each with its exact derivative.

They are written in terms of the student's probabilities p_S, the target's p_T and u = log p_T - log p_S, all of one
token over the vocabulary. The student's logits z_S enter only through p_S = softmax(z_S), so with D = sum_v s_v

    ph_v = p_S,v * ds_v / dp_S,v        dD/dz_S = ph - p_S * sum_v ph_v

A class that returns (s, ph) is all that a new divergence needs. `ph` has to be the derivative itself, not the
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
    """Returns m / p_S with u cut at LARGE, and log m - log p_S for any u; exactly 1 and 0 at u = 0.

        m = (1 - weight) p_S + weight p_T        m / p_S = 1 - weight + weight e^u

    It is made with exp and log: expm1 and log1p are several times as slow on a CPU, for digits that the sums over v do
    not keep.
    """
    if weight == 0.0:
        return torch.ones_like(u), torch.zeros_like(u)
    low = u.clamp(max=LARGE)
    ratio = torch.lerp(u.new_ones(()), low.exp(), weight)
    return ratio, ratio.log().add_(u - low)


class Divergence(ABC):
    """A divergence D(target, student) of two next-token distributions is a sum over the vocabulary."""

    @abstractmethod
    def terms(self, ps: Tensor, pt: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the summands s and ph = p_S ds/dp_S, two new tensors [..., vocab].

        Args:
            ps: probabilities of the student [..., vocab]
            pt: probabilities of the target [..., vocab]
            u: log pt - log ps [..., vocab]
        """


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(target || student) = sum_v p_T u pulls the student to cover all of the target."""

    def terms(self, ps: Tensor, pt: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return pt * u, -pt


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || target) = -sum_v p_S u makes the student leave what the target finds unlikely."""

    def terms(self, ps: Tensor, pt: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        summand = -ps * u
        return summand, summand + ps


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """JSD = beta KL(target || m) + (1 - beta) KL(student || m) compares both sides with their mixture m.

    m = (1 - beta) p_S + beta p_T. At beta = 1/2 the JSD lies in [0, ln 2]. Source: GKD, arXiv 2306.13649, equation 1,
    whose teacher is the target here.

    Args:
        beta: share of the target in the mixture, above 0 and below 1
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
    """KL(target || m) with m = (1 - skew) p_S + skew p_T is a forward KL that never exceeds -log(skew).

    skew = 0 is `ForwardKL`. Source: DistiLLM, arXiv 2402.03898, section 3.1.

    Args:
        skew: share of the target in the mixture m, at least 0 and below 1
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


KINDS = (ForwardKL, ReverseKL, JensenShannon, SkewKL)
"""The kernels know these; the order is that of `Kind` in cpu_rows.cpp."""


def mixture_weight(divergence: Divergence) -> float:
    """Returns the share of the target in the mixture of one of the `KINDS`; 0 for those without a mixture."""
    match divergence:
        case JensenShannon(weight) | SkewKL(weight):
            return weight
        case _:
            return 0.0


def clip_terms(summand: Tensor, ph: Tensor, clip: float, one_sided: bool) -> None:
    """Clamps each vocabulary summand to [-clip, clip], or to at most clip if `one_sided`, in place.

    Where the clamp binds, the summand no longer depends on the student, so its ph becomes zero: this is the exact
    derivative of the clamped sum. The one-sided form (OPSD's released code) keeps all negative summands and can
    therefore reverse the gradient; the symmetric form is OGLS-SD's.
    """
    binds = summand > clip if one_sided else summand.abs() > clip
    ph.masked_fill_(binds, 0.0)
    summand.clamp_(max=clip) if one_sided else summand.clamp_(-clip, clip)


def softmax_with_normaliser(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns softmax(logits) and log sum exp(logits) [rows, 1]; two maxima are cheaper than a second exponential."""
    probs = torch.softmax(logits, dim=-1)
    return probs, logits.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()
