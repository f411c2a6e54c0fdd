"""GRPO reinforces by advantages, which a teacher may shape token by token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ogls.loss.chunked import chunked_logprobs
from ogls.loss.objective import States, Target, Term
from ogls.loss.steering import Steering
from ogls.records import Lesson, Need
from ogls.system.ranges import POSITIVE, STRENGTH, TEMPERATURE, check


class Shaping(ABC):
    """A shaping has the teacher say which tokens earned the rollout's verdict, and sizes their advantages by it.

        e_t = log p_target(y_t) - log p_anchor(y_t)        the evidence of the sampled token y_t

    Target and anchor come from the method's steering. With `OutcomeContrast`, e_t is the contrast of RLCSD (arXiv
    2606.11709), log p(y_t | right attempt) - log p(y_t | wrong attempt); whatever both attempts do to the style cancels
    in it. With `PositiveOnly` at alpha 1, e_t is the gap of RLSD, log p(y_t | right attempt) - log p(y_t). The sign of
    an advantage stays the verifier's. Tokens that the teacher did not read have e_t = 0 and keep their advantage.
    """

    @abstractmethod
    def __call__(
        self, advantages: Float[Tensor, " tokens"], evidence: Float[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """Returns the shaped advantage A_t of every token.

        Args:
            advantages: advantage A of the rollout that each token belongs to
            evidence: evidence e_t of each token, in nats
        """


@dataclass(frozen=True)
class Scaled(Shaping):
    """Scaled multiplies the advantage by a bounded likelihood ratio (RLSD, arXiv 2604.03128).

        A_t = A (1 - strength + strength clip(exp(sign(A) e_t), 1 - clip, 1 + clip))

    Args:
        strength: share of the ratio in the factor, from 0 to 1; 0 leaves the advantages as they are
        clip: largest distance of the ratio from 1
    """

    strength: float = 0.5
    clip: float = 0.2

    def __post_init__(self) -> None:
        check(self, {"strength": "[0, 1]", "clip": "(0, 1)"})

    def __call__(
        self, advantages: Float[Tensor, " tokens"], evidence: Float[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        size = torch.exp((advantages.sign() * evidence).clamp(max=20.0)).clamp(1 - self.clip, 1 + self.clip)
        return advantages * torch.lerp(torch.ones_like(size), size, self.strength)


@dataclass(frozen=True)
class Shifted(Shaping):
    """Shifted adds a bounded step to the advantage, never past zero (RLCSD, arXiv 2606.11709).

        r_t = strength tanh(e_t / scale), 0 where |r_t| <= threshold        A_t = A + r_t, 0 where its sign would turn

    The defaults are as released. The released code takes p(y_t | wrong attempts) as a mean of probabilities over up to
    four attempts, and averages the shifted tokens apart from the others. Here several attempts per pool make a
    geometric mean, which for one attempt is the same, and all tokens share one average.

    Args:
        strength: largest step
        scale: evidence in nats at which the step has three quarters of its largest size
        threshold: size of a step up to which it counts as 0
    """

    strength: float = 0.5
    scale: float = 0.02
    threshold: float = 0.02

    def __post_init__(self) -> None:
        check(self, {"strength": STRENGTH, "scale": "[1e-6, 1e6]", "threshold": STRENGTH})

    def __call__(
        self, advantages: Float[Tensor, " tokens"], evidence: Float[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        step = self.strength * torch.tanh(evidence / self.scale)
        step = torch.where(step.abs() > self.threshold, step, 0.0)
        sign = advantages.sign()
        return sign * (advantages.abs() + sign * step).clamp(min=0.0)


@dataclass(frozen=True)
class GRPO(Term):
    """GRPO reinforces rollouts by their advantages (arXiv 2402.03300, equation 3, without its KL to a reference).

        -sum_t w_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)        r_t = pi_student(y_t) / pi_sampler(y_t)

    The sum runs over all tokens of every rollout with an advantage A. Even on-policy r_t need not be exactly 1: it also
    corrects for a sampler whose arithmetic differs from the trainer's. The KL to a reference is a term of its own:
    ``Mixture([GRPO(), ReferenceKL()], [1.0, 0.04])``.

    Its metrics are ``logprob``, ``ratio``, ``clip_fraction`` and, with a shaping, ``evidence``.

    Args:
        clip_low: distance below 1 at which the ratio is clipped
        clip_high: distance above 1 at which the ratio is clipped; unequal distances are DAPO's (arXiv 2503.14476: 0.2
            below and 0.28 above)
        per: unit of the mean: ``sequence`` gives every rollout the same weight, as published; ``token`` gives every
            token the same weight (DAPO)
        temperature: divisor of the logits; rollouts have to be drawn at the same temperature
        shaping: rule by which the teacher sizes the advantage of each token; null needs no teacher
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    per: Literal["sequence", "token"] = "sequence"
    temperature: float = 1.0
    shaping: Shaping | None = None

    def __post_init__(self) -> None:
        check(self, {"clip_low": "(0, 1)", "clip_high": POSITIVE, "temperature": TEMPERATURE})

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"rollouts", "peers", "advantages", "logprobs"})

    def target(self, steering: Steering) -> Target | None:
        return None if self.shaping is None else Target("teacher", steering)

    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        count = len(lesson.token_ids)
        weight = float(lesson.advantage != 0.0)
        return (weight / count if self.per == "sequence" else weight,) * count

    def __call__(self, states: States) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " tokens"]]]:
        if states.advantages is None or states.old_logprobs is None:
            raise ValueError("GRPO needs advantages and the sampler's log-probs, got None")
        logprob = chunked_logprobs(
            states.hidden_student, states.head_weight, states.head_bias, states.token_ids, temperature=self.temperature
        )
        advantages, extras = states.advantages.to(logprob.dtype), {}
        if self.shaping is not None:
            extras["evidence"] = self._evidence(states)
            advantages = self.shaping(advantages, extras["evidence"])
        # e^20 is far outside of any clip. Without the clamp an all but impossible token would make the ratio infinite.
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
            chunked_logprobs(hidden, *states.target_head, states.token_ids, temperature=self.temperature)
            for hidden in (states.hidden_target, states.hidden_anchor)
        )
        return at_target - at_anchor
