"""What a step minimises: terms that make a weighted sum over tokens out of the states of a micro-batch.

    sum_loss, extras = term(states)

A term says how much each token of a lesson counts for it (`token_weights`), and what it learns towards (`target`). It
returns a *weighted sum* over tokens; the caller divides by the sum of these weights over the whole optimiser step, so
that micro-batches and processes add up to one global mean. Without tokens the sum is exactly 0, with its graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ogls.loss.alpha_bound import Head
from ogls.loss.chunked import chunked_divergence, chunked_logprobs
from ogls.loss.divergence import Divergence, ForwardKL, ReverseKL
from ogls.loss.steering import Plain, Steered, Steering
from ogls.loss.topk import TopK, chunked_topk_divergence
from ogls.loss.weighting import TokenWeighting
from ogls.records import Lesson, Need


class Target(NamedTuple):
    """A target is made by a teacher, with its own weights or with those that training began with, and a steering."""

    weights: Literal["teacher", "start"]
    steering: Steering


@dataclass(frozen=True, kw_only=True)
class States:
    """A micro-batch as tensors, the tokens of all lessons in one row.

    Args:
        hidden_student: final-norm states of the student that predict each token
        head_weight: weight of the frozen output head, which student and teacher share
        head_bias: its bias, if it has one
        token_ids: the tokens
        token_weights: how much each counts
        lesson_of: number of the lesson that each token belongs to
        hidden_target: states of the target; None for a term without one
        hidden_anchor: states of the target before steering
        old_logprobs: the sampler's log-probabilities; None for text that was not sampled
        advantages: each token's share of its rollout's advantage
    """

    hidden_student: Float[Tensor, "tokens hidden"]
    head_weight: Float[Tensor, "vocab hidden"]
    token_ids: Int[Tensor, " tokens"]
    token_weights: Float[Tensor, " tokens"]
    head_bias: Float[Tensor, " vocab"] | None = None
    lesson_of: Int[Tensor, " tokens"] | None = None
    hidden_target: Float[Tensor, "tokens hidden"] | None = None
    hidden_anchor: Float[Tensor, "tokens hidden"] | None = None
    old_logprobs: Float[Tensor, " tokens"] | None = None
    advantages: Float[Tensor, " tokens"] | None = None

    @classmethod
    def of(cls, lessons: Sequence[Lesson], hidden_student: Float[Tensor, "tokens hidden"], head: Head) -> States:
        """Returns the learned tokens of some lessons, of which `hidden_student` has the student's states."""
        numbers = iter(range(len(lessons)))
        sampled = all(lesson.logprobs is not None for lesson in lessons)

        def row(values: Callable[[Lesson], Sequence[float]]) -> Tensor:
            return per_token(lessons, values, hidden_student)

        return cls(
            hidden_student=hidden_student,
            head_weight=head[0],
            head_bias=head[1],
            token_ids=row(lambda lesson: lesson.token_ids).long(),
            token_weights=row(lambda lesson: lesson.token_weights),
            lesson_of=row(lambda lesson: (next(numbers),) * len(lesson.token_ids)).long(),
            old_logprobs=row(lambda lesson: lesson.logprobs or ()) if sampled else None,
            advantages=row(lambda lesson: (lesson.advantage,) * len(lesson.token_ids)),
        )

    def towards(self, target: Steered) -> States:
        """Returns the same with a target."""
        return replace(self, hidden_anchor=target.anchor, hidden_target=target.states)

    def weighted(self, token_weights: Float[Tensor, " tokens"]) -> States:
        """Returns the tokens whose weight in `token_weights` is not 0, with these weights."""
        rows = token_weights.nonzero().squeeze(1)

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return replace(
            self,
            hidden_student=self.hidden_student[rows],
            token_ids=self.token_ids[rows],
            token_weights=token_weights[rows],
            lesson_of=of(self.lesson_of),
            hidden_target=of(self.hidden_target),
            hidden_anchor=of(self.hidden_anchor),
            old_logprobs=of(self.old_logprobs),
            advantages=of(self.advantages),
        )


class Objective(ABC):
    """An objective is a sum of terms, each of which is averaged over its own tokens."""

    @property
    @abstractmethod
    def terms(self) -> tuple[tuple[float, Term], ...]:
        """Factors and terms of the sum."""


class Term(Objective):
    """A term is an objective by itself: states -> (differentiable weighted sum, detached values per token by name)."""

    temperature: float = 1.0
    """Divides the logits of the student before its log-probabilities are taken."""

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        return ((1.0, self),)

    @property
    def needs(self) -> frozenset[Need]:
        """What it asks of the method: ``advantages``, ``logprobs``."""
        return frozenset()

    def target(self, steering: Steering) -> Target | None:
        """Returns what it learns towards, where the method has this steering; None where nobody teaches."""
        return None

    def num_scored(self, lesson: Lesson) -> int:
        """Returns how many of the lesson's first tokens the teacher has to read for `target`."""
        return lesson.num_weighted if lesson.views else 0

    @abstractmethod
    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        """Returns how much each token of the lesson counts; 0 leaves it out."""

    @abstractmethod
    def __call__(self, states: States) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Distillation(Term):
    """Distillation minimises sum_t w_t D(target_t, student_t) over the tokens of lessons with views.

    Extras: ``divergence``, unweighted, and ``logprob``, the student's for the sampled token at `temperature`.

    Args:
        divergence: D, by its formula
        support: what D sums over: null for the whole vocabulary, `TopK` for the likeliest tokens and one bucket (SDPO)
        temperature: divisor of the logits of both sides
        clip: bound of each vocabulary summand of D, which is clamped to ±clip (OGLS-SD: 0.05); null leaves it free
        one_sided: whether the bound is from above alone (OPSD's released code)
        importance_cap: factor min(pi_student / pi_sampler, cap) of w_t for the sampled token, taken as a constant
            (SDPO, ROSD: 2); the sampler's log-probabilities have to be at the same temperature
        weighting: what multiplies w_t once student and target are known; null leaves it as it is
        steering: what makes the target; null is the method's steering
        compiled: whether the passes over the whole vocabulary go through torch.compile: on a CPU a fifth quicker per
            token, which some 50,000 tokens pay back (150,000 where it is first built)
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    support: TopK | None = None
    temperature: float = 1.0
    clip: float | None = None
    one_sided: bool = False
    importance_cap: float | None = None
    weighting: TokenWeighting | None = None
    steering: Steering | None = None
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
    def needs(self) -> frozenset[Need]:
        return frozenset() if self.importance_cap is None else frozenset({"logprobs"})

    def target(self, steering: Steering) -> Target | None:
        return Target("teacher", self.steering or steering)

    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        return lesson.token_weights if lesson.views else (0.0,) * len(lesson.token_weights)

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
            states.head_weight,
            states.head_bias,
            self.divergence,
            temperature=self.temperature,
            clip=self.clip,
            one_sided=self.one_sided,
            token_ids=states.token_ids,
        )
        assert logprob is not None
        weights = states.token_weights.to(divergence.dtype)
        if self.weighting is not None:
            weights = weights * self.weighting(states, divergence.detach(), self.temperature)
        if self.importance_cap is not None:
            weights = weights * capped_ratio(logprob, states.old_logprobs, self.importance_cap)
        return (weights * divergence).sum(), {"divergence": divergence.detach(), "logprob": logprob}


@dataclass(frozen=True)
class ReferenceKL(Distillation):
    """ReferenceKL keeps the student near the model that training began with: KL(student || start) of every token.

        sum_t w_t sum_v pi_student(v) log(pi_student(v) / pi_start(v))      exact, over the whole vocabulary

    over all learned tokens of every rollout that is learned from in any way; the start reads the problem alone. It is
    the second half of GRPO's published loss (arXiv 2402.03300, equation 3), where its factor is 0.04.

    Extras: ``kl_to_reference``, unweighted.

    Args:
        per: what is averaged: ``sequence``, where every rollout weighs the same, or ``token``, where every token does
    """

    divergence: Divergence = field(default_factory=ReverseKL)
    per: Literal["sequence", "token"] = "sequence"

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {"rollouts"}

    def target(self, steering: Steering) -> Target | None:
        return Target("start", self.steering or Plain())

    def num_scored(self, lesson: Lesson) -> int:
        return lesson.num_learned

    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        learned, count = lesson.num_learned, len(lesson.token_ids)
        weight = 1.0 / learned if self.per == "sequence" and learned else 1.0
        return (weight,) * learned + (0.0,) * (count - learned)

    def __call__(self, states: States) -> tuple[Tensor, dict[str, Tensor]]:
        loss, extras = super().__call__(states)
        return loss, {"kl_to_reference": extras["divergence"]}


@dataclass(frozen=True)
class Likelihood(Term):
    """Likelihood minimises -sum_t w_t log pi_student(token_t) over lessons without views: supervised fine-tuning.

    Extras: ``logprob``.
    """

    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        return (0.0,) * len(lesson.token_weights) if lesson.views else lesson.token_weights

    def __call__(self, states: States) -> tuple[Tensor, dict[str, Tensor]]:
        logprob = chunked_logprobs(states.hidden_student, states.head_weight, states.head_bias, states.token_ids)
        return -(states.token_weights.to(logprob.dtype) * logprob).sum(), {"logprob": logprob.detach()}


@dataclass(frozen=True)
class Mixture(Objective):
    """A mixture minimises sum_i factor_i * mean of objective_i over its own tokens.

    GRPO beside a distillation, for example: all rollouts of mixed groups carry advantages, those with views are
    distilled as well. Where the same tokens count for several terms, they share the student's pass; each term may have
    a steering of its own.

    Args:
        objectives: what is added up
        factors: one per objective; none at all means 1 for each
    """

    objectives: list[Objective]
    factors: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", list(self.objectives))  # a tuple is as good
        object.__setattr__(self, "factors", list(self.factors))
        if not self.objectives or len(self.factors) not in (0, len(self.objectives)):
            raise ValueError(
                f"Mixture needs one factor per objective, or none, got {len(self.factors)} for "
                f"{len(self.objectives)} objectives"
            )
        if any(not factor > 0 for factor in self.factors):
            raise ValueError(f"Mixture needs factors above 0, got {self.factors}")

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        pairs = zip(self.factors or [1.0] * len(self.objectives), self.objectives, strict=True)
        return tuple((factor * inner, term) for factor, objective in pairs for inner, term in objective.terms)


def per_token(lessons: Sequence[Lesson], values: Callable[[Lesson], Sequence[float]], like: Tensor) -> Tensor:
    """Returns one value for each learned token of the lessons [tokens], on the device of `like`."""
    return torch.tensor(
        [value for lesson in lessons for value in values(lesson)[: lesson.num_learned]], device=like.device
    )


def capped_ratio(logprob: Tensor, old_logprobs: Tensor | None, cap: float) -> Tensor:
    """Returns min(exp(logprob - old_logprobs), cap) [tokens]; cannot overflow."""
    if old_logprobs is None:
        raise ValueError("importance_cap needs the sampler's log-probs, got old_logprobs=None")
    return torch.exp(logprob - old_logprobs.to(logprob.dtype)).clamp(max=cap)
