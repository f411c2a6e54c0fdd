"""Reinforcement by advantages: GRPO, and the same with the teacher's opinion of each token in its advantage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ogls.loss.chunked import chunked_logprobs
from ogls.loss.objective import States, Target, Term
from ogls.loss.steering import Steering
from ogls.records import Lesson, Need


class Shaping(ABC):
    """Self-distillation as the size of advantages: the teacher says which tokens earned the rollout's verdict.

        e_t = log p_target(y_t) - log p_anchor(y_t)        of the sampled token, under the run's steering

    The verifier keeps the sign. With `OutcomeContrast` as steering e_t is the contrast of RLCSD (arXiv 2606.11709),
    log p(y_t | right attempt) - log p(y_t | wrong attempt), in which what any attempt in view does to the style
    cancels; with `PositiveOnly` at alpha 1, the gap of RLSD, log p(y_t | right attempt) - log p(y_t).
    Tokens that nobody scored have no evidence, e_t = 0, and keep their advantage.
    """

    @abstractmethod
    def __call__(self, advantages: Tensor, evidence: Tensor) -> Tensor:
        """A_t of tokens with the advantage A of their rollout and evidence e_t, all [tokens]."""


@dataclass(frozen=True)
class Scaled(Shaping):
    """RLSD (arXiv 2604.03128): the advantage times a bounded likelihood ratio.

    A_t = A (1 - strength + strength clip(exp(sign(A) e_t), 1 - clip, 1 + clip))
    """

    strength: float = 0.5
    clip: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"Scaled needs strength in [0, 1], got {self.strength}")
        if not 0.0 < self.clip < 1.0:
            raise ValueError(f"Scaled needs clip in (0, 1), got {self.clip}")

    def __call__(self, advantages: Tensor, evidence: Tensor) -> Tensor:
        size = torch.exp((advantages.sign() * evidence).clamp(max=20.0)).clamp(1 - self.clip, 1 + self.clip)
        return advantages * torch.lerp(torch.ones_like(size), size, self.strength)


@dataclass(frozen=True)
class Shifted(Shaping):
    """RLCSD (arXiv 2606.11709): the advantage plus a bounded step, never past zero.

        r_t = strength tanh(e_t / scale), 0 where |r_t| <= threshold        A_t = A + r_t, 0 where its sign would turn

    Defaults as released. There, p(y_t | wrong attempts) is a mean of probabilities over up to four attempts, and the
    shifted tokens are averaged apart from the others; here one attempt a pool is the same, several are a geometric
    mean, and all tokens share one average.
    """

    strength: float = 0.5
    scale: float = 0.02
    threshold: float = 0.02

    def __post_init__(self) -> None:
        if not (self.strength >= 0.0 and self.scale > 0.0 and self.threshold >= 0.0):
            raise ValueError(
                "Shifted needs strength >= 0, scale > 0 and threshold >= 0, "
                f"got {self.strength}, {self.scale} and {self.threshold}"
            )

    def __call__(self, advantages: Tensor, evidence: Tensor) -> Tensor:
        step = self.strength * torch.tanh(evidence / self.scale)
        step = torch.where(step.abs() > self.threshold, step, 0.0)
        sign = advantages.sign()
        return sign * (advantages.abs() + sign * step).clamp(min=0.0)


@dataclass(frozen=True)
class GRPO(Term):
    """GRPO reinforces rollouts by their advantages (arXiv 2402.03300, equation 3, without its KL to a reference).

        -sum_t w_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)        r_t = pi_student(y_t) / pi_sampler(y_t)

    over all tokens of every rollout with an advantage A. r_t also corrects for an engine that disagrees with the
    trainer, so that on-policy it need not be exactly 1. The KL to a reference is a term of its own:
    ``Mixture([GRPO(), ReferenceKL()], [1.0, 0.04])``.

    Args:
        clip_low: the ratio counts from 1 - clip_low
        clip_high: the ratio counts up to 1 + clip_high; unequal bounds are DAPO's (arXiv 2503.14476: 0.2 and 0.28)
        per: what is averaged: ``sequence``, where every rollout weighs the same, as published, or ``token`` (DAPO)
        temperature: divisor of the logits, with which the sampler has to draw
        shaping: how the teacher sizes the advantages, token by token; null needs no teacher
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    per: Literal["sequence", "token"] = "sequence"
    temperature: float = 1.0
    shaping: Shaping | None = None

    def __post_init__(self) -> None:
        if not (0.0 < self.clip_low < 1.0 and self.clip_high > 0.0):
            raise ValueError(
                f"GRPO needs clip_low in (0, 1) and clip_high > 0, got {self.clip_low} and {self.clip_high}"
            )
        if not self.temperature > 0.0:
            raise ValueError(f"GRPO needs temperature > 0, got temperature={self.temperature}")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"rollouts", "peers", "advantages", "logprobs"})

    def target(self, steering: Steering) -> Target | None:
        return None if self.shaping is None else Target("teacher", steering)

    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        count = len(lesson.token_ids)
        weight = float(lesson.advantage != 0.0)
        return (weight / count if self.per == "sequence" else weight,) * count

    def __call__(self, states: States) -> tuple[Tensor, dict[str, Tensor]]:
        if states.advantages is None or states.old_logprobs is None:
            raise ValueError("GRPO needs advantages and the sampler's log-probs, got None")
        logprob = chunked_logprobs(
            states.hidden_student, states.head_weight, states.head_bias, states.token_ids, temperature=self.temperature
        )
        advantages, extras = states.advantages.to(logprob.dtype), {}
        if self.shaping is not None:
            extras["evidence"] = self._evidence(states)
            advantages = self.shaping(advantages, extras["evidence"])
        # e^20 is far outside of any clip, and no infinity where a wrong rollout has an all but impossible token.
        ratio = torch.exp((logprob - states.old_logprobs.to(logprob.dtype)).clamp(max=20.0))
        free, clipped = ratio * advantages, ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        loss = -(states.token_weights.to(logprob.dtype) * torch.minimum(free, clipped)).sum()
        extras |= {
            "logprob": logprob.detach(),
            "ratio": ratio.detach(),
            "clip_fraction": (clipped < free).to(logprob.dtype).detach(),
        }
        return loss, extras

    @torch.no_grad()
    def _evidence(self, states: States) -> Tensor:
        if states.hidden_target is None or states.hidden_anchor is None:
            raise ValueError("shaping needs the states of target and anchor, got None")
        at_target, at_anchor = (
            chunked_logprobs(
                hidden, states.head_weight, states.head_bias, states.token_ids, temperature=self.temperature
            )
            for hidden in (states.hidden_target, states.hidden_anchor)
        )
        return at_target - at_anchor
