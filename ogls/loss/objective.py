"""Objectives: what is done with the states of a micro-batch.

    sum_loss, extras = term(states)

A term says how much each token of a lesson counts for it (`weights_of`) and returns a *weighted sum* over tokens; the
caller divides by the sum of these weights over the whole optimiser step, so that micro-batches and ranks add up to one
global mean. Without tokens the sum is exactly 0, with its graph. `ogls.loss.objective` adds such means.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ogls.loss.chunked import chunked_divergence, chunked_logprobs
from ogls.loss.divergence import Divergence, ForwardKL
from ogls.loss.topk import TopK, chunked_topk_divergence
from ogls.records import Lesson


@dataclass(frozen=True, kw_only=True)
class States:
    """A micro-batch as tensors, all lessons' tokens in one row.

    hidden_student, hidden_target, hidden_anchor [tokens, hidden]: final-norm states that predict each token; the
    target's and the anchor's (the target before steering) are None when the objective needs no teacher. weight [vocab,
    hidden], bias [vocab]: the frozen head of all. token_ids, token_weights, old_logprobs (the sampler's; None for text
    that was not sampled), advantages: [tokens].
    """

    hidden_student: Tensor
    weight: Tensor
    token_ids: Tensor
    token_weights: Tensor
    bias: Tensor | None = None
    hidden_target: Tensor | None = None
    hidden_anchor: Tensor | None = None
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None

    def weighted(self, token_weights: Tensor) -> States:
        """The tokens whose weight in `token_weights` [tokens] is not 0, with these weights."""
        rows = token_weights.nonzero().squeeze(1)

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return replace(
            self,
            hidden_student=self.hidden_student[rows],
            token_ids=self.token_ids[rows],
            token_weights=token_weights[rows],
            hidden_target=of(self.hidden_target),
            hidden_anchor=of(self.hidden_anchor),
            old_logprobs=of(self.old_logprobs),
            advantages=of(self.advantages),
        )


class Objective(ABC):
    """What a step minimises: a sum of terms, each of which is averaged over its own tokens."""

    @property
    @abstractmethod
    def terms(self) -> tuple[tuple[float, Term], ...]:
        """Factors and terms of the sum."""

    @property
    def needs_teacher(self) -> bool:
        """Whether `hidden_target` has to be made."""
        return any(term.needs_teacher for _, term in self.terms)

    @property
    def needs_advantage(self) -> bool:
        """Whether it is rollouts' advantages that are learned from."""
        return any(term.needs_advantage for _, term in self.terms)

    @property
    def corrects_staleness(self) -> bool:
        """Whether tokens that an older policy sampled are weighted by an importance ratio."""
        return all(term.corrects_staleness for _, term in self.terms)


class Term(Objective):
    """An objective of one term: states -> (differentiable weighted sum, detached values of each token by name)."""

    temperature: float = 1.0
    """Of the student's log-probs."""

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        return ((1.0, self),)

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def needs_advantage(self) -> bool:
        return False

    @property
    def corrects_staleness(self) -> bool:
        return False

    @abstractmethod
    def weights_of(self, lesson: Lesson) -> Sequence[float]:
        """How much each token of the lesson counts; 0 leaves it out."""

    @abstractmethod
    def __call__(self, states: States) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Distillation(Term):
    """sum_t w_t D(target_t, student_t), of lessons with views.

    `support` None takes the whole vocabulary, `TopK` the likeliest tokens and one bucket for the rest (SDPO).
    `temperature` divides the logits of both sides. `clip` bounds each vocabulary summand of D: to ±clip (OGLS-SD:
    0.05), or with `one_sided` to at most clip (OPSD's released code). `importance_cap` multiplies w_t by
    min(pi_student / pi_sampler, cap) of the sampled token, taken as a constant (SDPO, ROSD: 2); the sampler's log-probs
    have to be at the same temperature. `compiled` runs the passes over the whole vocabulary through torch.compile:
    on a CPU a fifth quicker a token, which some 50,000 tokens pay back (150,000 where it is first built).

    Extras: `divergence`, unweighted, and `logprob`, the student's for the sampled token at `temperature`.
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    support: TopK | None = None
    temperature: float = 1.0
    clip: float | None = None
    one_sided: bool = False
    importance_cap: float | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.compiled and self.support is not None:
            raise ValueError("Distillation compiles the passes over the whole vocabulary: got compiled and a support")
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

    def weights_of(self, lesson: Lesson) -> Sequence[float]:
        return lesson.weights if lesson.views else (0.0,) * len(lesson.weights)

    def __call__(self, states: States) -> tuple[Tensor, dict[str, Tensor]]:
        if states.hidden_target is None:
            raise ValueError("Distillation needs the target's states, got hidden_target=None")
        if self.support is None:
            compute = partial(chunked_divergence, compiled=self.compiled)
        else:
            compute = partial(chunked_topk_divergence, support=self.support)
        divergence, logprob = compute(
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
class Likelihood(Term):
    """-sum_t w_t log pi_student(token_t), of lessons without views: supervised fine-tuning. Extras: `logprob`."""

    def weights_of(self, lesson: Lesson) -> Sequence[float]:
        return (0.0,) * len(lesson.weights) if lesson.views else lesson.weights

    def __call__(self, states: States) -> tuple[Tensor, dict[str, Tensor]]:
        logprob = chunked_logprobs(states.hidden_student, states.weight, states.bias, states.token_ids)
        return -(states.token_weights.to(logprob.dtype) * logprob).sum(), {"logprob": logprob.detach()}


def capped_ratio(logprob: Tensor, old_logprobs: Tensor | None, cap: float) -> Tensor:
    """min(exp(logprob - old_logprobs), cap) [tokens]; cannot overflow."""
    if old_logprobs is None:
        raise ValueError("importance_cap needs the sampler's log-probs, got old_logprobs=None")
    return torch.exp(logprob - old_logprobs.to(logprob.dtype)).clamp(max=cap)


@dataclass(frozen=True)
class Mixture(Objective):
    """sum_i factor_i * mean of objective_i over its own tokens: several roles of the signal in one step.

    GRPO beside a distillation, for example: all rollouts of mixed groups carry advantages, those with views are
    distilled as well. Where the same tokens count for several terms, they share the student's pass.
    """

    objectives: tuple[Objective, ...]
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.objectives or len(self.objectives) != len(self.factors):
            raise ValueError(
                f"Mixture needs one factor an objective, got {len(self.factors)} for {len(self.objectives)} objectives"
            )
        if min(self.factors) <= 0:
            raise ValueError(f"Mixture needs factors above 0, got {self.factors}")

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        pairs = zip(self.factors, self.objectives, strict=True)
        return tuple((factor * inner, term) for factor, objective in pairs for inner, term in objective.terms)
