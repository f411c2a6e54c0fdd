"""Objectives: what is done with the states of a micro-batch.

    sum_loss, extras = objective(states)

An objective returns a *weighted sum* over tokens; the caller divides by the sum of token weights of the whole optimiser
step, so that micro-batches and ranks add up to one global mean. Without tokens the sum is exactly 0, with its graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ogls.divergence import Divergence, ForwardKL
from ogls.kernels import chunked_divergence, chunked_logprobs


@dataclass(frozen=True, kw_only=True)
class States:
    """A micro-batch as tensors, all lessons' tokens in one row.

    hidden_student, hidden_target [tokens, hidden]: final-norm states that predict each token; the target's is None when
    the objective needs no teacher. weight [vocab, hidden], bias [vocab]: the frozen head of both. token_ids,
    token_weights, old_logprobs (the sampler's; None for text that was not sampled), advantages: [tokens].
    """

    hidden_student: Tensor
    weight: Tensor
    token_ids: Tensor
    token_weights: Tensor
    bias: Tensor | None = None
    hidden_target: Tensor | None = None
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None


class Objective(ABC):
    """States -> (differentiable weighted sum, detached values of each token by name)."""

    @property
    @abstractmethod
    def needs_teacher(self) -> bool:
        """Whether `hidden_target` has to be made."""

    @property
    def corrects_staleness(self) -> bool:
        """Whether tokens that an older policy sampled are weighted by an importance ratio."""
        return False

    @abstractmethod
    def __call__(self, states: States) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Distillation(Objective):
    """sum_t w_t D(target_t, student_t) over the whole vocabulary.

    `temperature` divides the logits of both sides. `clip` bounds each vocabulary summand of D: to ±clip (OGLS-SD:
    0.05), or with `one_sided` to at most clip (OPSD's released code). `importance_cap` multiplies w_t by
    min(pi_student / pi_sampler, cap) of the sampled token, taken as a constant (SDPO, ROSD: 2); the sampler's log-probs
    have to be at the same temperature.

    Extras: `divergence`, unweighted, and `logprob`, the student's for the sampled token at `temperature`.
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    temperature: float = 1.0
    clip: float | None = None
    one_sided: bool = False
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"Distillation needs temperature > 0, got temperature={self.temperature}")
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"Distillation needs clip > 0, or none, got clip={self.clip}")
        if self.one_sided and self.clip is None:
            raise ValueError("Distillation needs a clip for one_sided=True, got clip=None")
        if self.importance_cap is not None and not self.importance_cap > 0.0:
            raise ValueError(f"Distillation needs importance_cap > 0, or none, got {self.importance_cap}")

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def corrects_staleness(self) -> bool:
        return self.importance_cap is not None

    def __call__(self, states: States) -> tuple[Tensor, dict[str, Tensor]]:
        if states.hidden_target is None:
            raise ValueError("Distillation needs the target's states, got hidden_target=None")
        divergence, logprob = chunked_divergence(
            states.hidden_student,
            states.hidden_target,
            states.weight,
            states.bias,
            self.divergence,
            temperature=self.temperature,
            clip=self.clip,
            one_sided=self.one_sided,
            token_ids=states.token_ids,
        )
        assert logprob is not None
        weights = states.token_weights.to(divergence.dtype)
        if self.importance_cap is not None:
            weights = weights * capped_ratio(logprob, states.old_logprobs, self.importance_cap)
        return (weights * divergence).sum(), {"divergence": divergence.detach(), "logprob": logprob}


@dataclass(frozen=True)
class Likelihood(Objective):
    """-sum_t w_t log pi_student(token_t): supervised fine-tuning on the lesson's own tokens. Extras: `logprob`."""

    @property
    def needs_teacher(self) -> bool:
        return False

    def __call__(self, states: States) -> tuple[Tensor, dict[str, Tensor]]:
        logprob = chunked_logprobs(states.hidden_student, states.weight, states.bias, states.token_ids)
        return -(states.token_weights.to(logprob.dtype) * logprob).sum(), {"logprob": logprob.detach()}


def capped_ratio(logprob: Tensor, old_logprobs: Tensor | None, cap: float) -> Tensor:
    """min(exp(logprob - old_logprobs), cap) [tokens]; cannot overflow."""
    if old_logprobs is None:
        raise ValueError("importance_cap needs the sampler's log-probs, got old_logprobs=None")
    return torch.exp(logprob - old_logprobs.to(logprob.dtype)).clamp(max=cap)
