"""An objective is a sum of terms, each a weighted mean of losses over tokens.

    weighted_sum, metrics = term(states)

A term says how much each token of a lesson counts for it (`token_weights`), and what it learns towards (`target`). For
one micro-batch it returns a *weighted sum* over tokens. The caller divides by the sum of these weights over the whole
optimiser step, so that micro-batches and processes add up to one global mean. Without tokens the sum is exactly 0, and
still has a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from ogls.loss.chunked import Head, chunked_divergence, chunked_logprobs
from ogls.loss.divergence import Divergence, ForwardKL, ReverseKL
from ogls.loss.steering import Plain, Steered, Steering
from ogls.loss.topk import TopK
from ogls.loss.weighting import TokenWeighting
from ogls.records import Lesson, Need
from ogls.system.ranges import POSITIVE, TEMPERATURE, check, within


class Target(NamedTuple):
    """A target is what a steering makes of the views that some weights read.

    Args:
        weights: ``teacher`` for the weights of the method's teacher, ``start`` for those that training began with
        steering: rule that makes one distribution of all views
    """

    weights: Literal["teacher", "start"]
    steering: Steering


@dataclass(frozen=True, kw_only=True)
class States:
    """States are a micro-batch as tensors, with the tokens of all its lessons in one row.

    Args:
        hidden_student: final-norm states of the student that predict each token
        head_weight: weight of the student's frozen output head
        token_ids: ids of the tokens
        token_weights: weight of each token in the mean
        head_bias: bias of the student's frozen output head; None where it has none
        lesson_of: number of the lesson that each token belongs to
        hidden_target: states of the target; None for a term without one
        hidden_anchor: states of the target before steering; None for a term without one
        head_target: weight and bias of the head of target and anchor, where another model has them; None is the
            student's
        old_logprobs: log-probabilities of the tokens when they were sampled; NaN at a token that was not, None for text
            that was not
        advantages: advantage of the rollout that each token belongs to
    """

    hidden_student: Float[Tensor, "tokens hidden"]
    head_weight: Float[Tensor, "vocab hidden"]
    token_ids: Int[Tensor, " tokens"]
    token_weights: Float[Tensor, " tokens"]
    head_bias: Float[Tensor, " vocab"] | None = None
    lesson_of: Int[Tensor, " tokens"] | None = None
    hidden_target: Float[Tensor, "tokens hidden_target"] | None = None
    hidden_anchor: Float[Tensor, "tokens hidden_target"] | None = None
    head_target: Head | None = None
    old_logprobs: Float[Tensor, " tokens"] | None = None
    advantages: Float[Tensor, " tokens"] | None = None

    @classmethod
    def of(cls, lessons: Sequence[Lesson], hidden_student: Float[Tensor, "tokens hidden"], head: Head) -> States:
        """Returns the learned tokens of some lessons.

        Args:
            lessons: lessons of the micro-batch
            hidden_student: final-norm states of the student that predict their learned tokens
            head: weight and bias of the output head
        """
        numbers = iter(range(len(lessons)))

        def row(values: Callable[[Lesson], Sequence[float]]) -> Tensor:
            return per_token(lessons, values, hidden_student)

        return cls(
            hidden_student=hidden_student,
            head_weight=head[0],
            head_bias=head[1],
            token_ids=row(lambda lesson: lesson.token_ids).long(),
            token_weights=row(lambda lesson: lesson.token_weights),
            lesson_of=row(lambda lesson: (next(numbers),) * len(lesson.token_ids)).long(),
            old_logprobs=row(lambda lesson: lesson.logprobs or (nan,) * len(lesson.token_ids)),
            advantages=row(lambda lesson: (lesson.advantage,) * len(lesson.token_ids)),
        )

    @property
    def target_head(self) -> Head:
        """Returns weight and bias of the head that makes logits of the states of target and anchor."""
        return self.head_target or (self.head_weight, self.head_bias)

    def towards(self, target: Steered) -> States:
        """Returns a copy that has the states of `target` and of its anchor, and their head."""
        return replace(self, hidden_anchor=target.anchor, hidden_target=target.states, head_target=target.head)

    def weighted(self, token_weights: Float[Tensor, " tokens"]) -> States:
        """Returns a copy that has only the tokens whose number in `token_weights` is not 0, with these weights.

        Its `old_logprobs` are None where one of these tokens was not sampled.
        """
        rows = token_weights.nonzero().squeeze(1)

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        old = of(self.old_logprobs)

        return replace(
            self,
            hidden_student=self.hidden_student[rows],
            token_ids=self.token_ids[rows],
            token_weights=token_weights[rows],
            lesson_of=of(self.lesson_of),
            hidden_target=of(self.hidden_target),
            hidden_anchor=of(self.hidden_anchor),
            old_logprobs=None if old is None or old.isnan().any() else old,
            advantages=of(self.advantages),
        )


class Objective(ABC):
    """An objective is a sum of terms, each of which is averaged over its own tokens."""

    @property
    @abstractmethod
    def terms(self) -> tuple[tuple[float, Term], ...]:
        """Returns the summands, each as its factor and its term."""


class Term(Objective):
    """A term is the mean of one loss over the tokens that count for it; it is an objective by itself."""

    temperature: float = 1.0
    """The logits of the student are divided by this number before its log-probabilities are taken."""

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        return ((1.0, self),)

    @property
    def needs(self) -> frozenset[Need]:
        """Returns what the term asks of the method and the run, such as ``advantages`` or ``logprobs``."""
        return frozenset()

    def target(self, steering: Steering) -> Target | None:
        """Returns what the term learns towards; None where it needs no teacher.

        Args:
            steering: steering of the method, which a term may replace by its own
        """
        return None

    def num_scored(self, lesson: Lesson) -> int:
        """Returns how many of the lesson's first tokens the teacher has to read to make the target."""
        return lesson.num_weighted if lesson.views else 0

    @abstractmethod
    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        """Returns how much each token of the lesson counts for this term; 0 leaves it out."""

    @abstractmethod
    def __call__(self, states: States) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " tokens"]]]:
        """Returns the differentiable sum of weighted losses, and detached values per token by metric name."""


@dataclass(frozen=True)
class Distillation(Term):
    """Distillation minimises sum_t w_t D(target_t, student_t) over the tokens of lessons with views.

    Its metrics are ``divergence``, without weights, and ``logprob``, the student's log-probability of the token.

    Args:
        divergence: divergence D between the target's and the student's next-token distribution
        support: tokens that D sums over: null for the whole vocabulary, `TopK` for the likeliest ones and one bucket
            that holds all others (SDPO)
        temperature: divisor of the logits of target and student
        clip: bound of each vocabulary summand of D, which is clamped to ±clip (OGLS-SD: 0.05); null leaves it free
        one_sided: whether `clip` bounds the summands from above alone (OPSD's released code)
        importance_cap: upper bound of the ratio pi_student / pi_sampler of the sampled token, which then multiplies the
            token's weight as a constant (SDPO, ROSD: 2); null leaves the ratio out. Rollouts have to be drawn at the
            same temperature, from the whole distribution.
        weighting: further factor of each token's weight, made of the states of student and target; null adds none
        steering: rule that makes the target of the teacher's views; null takes the method's steering
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    support: TopK | None = None
    temperature: float = 1.0
    clip: float | None = None
    one_sided: bool = False
    importance_cap: float | None = None
    weighting: TokenWeighting | None = None
    steering: Steering | None = None

    def __post_init__(self) -> None:
        check(self, {"temperature": TEMPERATURE, "clip": POSITIVE, "importance_cap": POSITIVE})
        if self.one_sided and self.clip is None:
            raise ValueError("Distillation needs a clip for one_sided=True, got clip=None")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset() if self.importance_cap is None else frozenset({"logprobs"})

    def target(self, steering: Steering) -> Target | None:
        return Target("teacher", self.steering or steering)

    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        return lesson.token_weights if lesson.views else (0.0,) * len(lesson.token_weights)

    def __call__(self, states: States) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " tokens"]]]:
        if states.hidden_target is None:
            raise ValueError("Distillation needs the target's states, got hidden_target=None")
        divergence, logprob = chunked_divergence(
            states.hidden_student,
            states.hidden_target,
            states.head_weight,
            states.head_bias,
            self.divergence,
            head_target=states.head_target,
            support=self.support,
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
    """ReferenceKL keeps the student near the model that training began with, by KL(student || start) of every token.

        sum_t w_t sum_v pi_student(v) log(pi_student(v) / pi_start(v))      exact, over the whole vocabulary

    The sum runs over all learned tokens of every rollout that is learned from in any way; the start reads the problem
    alone. This is the second half of GRPO's published loss (arXiv 2402.03300, equation 3), where its factor is 0.04.

    Its metric is ``kl_to_reference``, without weights.

    Args:
        per: unit of the mean: ``sequence`` gives every rollout the same weight, ``token`` every token
    """

    divergence: Divergence = field(default_factory=ReverseKL)
    per: Literal["sequence", "token"] = "sequence"

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | frozenset[Need]({"rollouts"})

    def target(self, steering: Steering) -> Target | None:
        return Target("start", self.steering or Plain())

    def num_scored(self, lesson: Lesson) -> int:
        return lesson.num_learned

    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        learned, count = lesson.num_learned, len(lesson.token_ids)
        weight = 1.0 / learned if self.per == "sequence" and learned else 1.0
        return (weight,) * learned + (0.0,) * (count - learned)

    def __call__(self, states: States) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " tokens"]]]:
        loss, extras = super().__call__(states)
        return loss, {"kl_to_reference": extras["divergence"]}


@dataclass(frozen=True)
class Likelihood(Term):
    """Likelihood minimises -sum_t w_t log pi_student(token_t) over lessons without views (supervised fine-tuning).

    Its metric is ``logprob``, the student's log-probability of the token.
    """

    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        return (0.0,) * len(lesson.token_weights) if lesson.views else lesson.token_weights

    def __call__(self, states: States) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " tokens"]]]:
        logprob = chunked_logprobs(states.hidden_student, states.head_weight, states.head_bias, states.token_ids)
        return -(states.token_weights.to(logprob.dtype) * logprob).sum(), {"logprob": logprob.detach()}


@dataclass(frozen=True)
class Mixture(Objective):
    """A mixture minimises a sum of objectives: sum_i factor_i * (mean of objective_i over its own tokens).

    One example is GRPO beside a distillation: all rollouts of mixed groups carry advantages, and those with views are
    distilled as well. Tokens that count for several terms run through the student once. Each term may have a steering
    of its own.

    Args:
        objectives: list of the objectives that are added up
        factors: one factor per objective; an empty list means 1 for each
    """

    objectives: list[Objective]
    factors: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", list(self.objectives))  # lists of its own
        object.__setattr__(self, "factors", list(self.factors))
        if not self.objectives or len(self.factors) not in (0, len(self.objectives)):
            raise ValueError(
                f"Mixture needs one factor per objective, or none, got {len(self.factors)} for "
                f"{len(self.objectives)} objectives"
            )
        for factor in self.factors:
            within("Mixture.factors", factor, POSITIVE)

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        pairs = zip(self.factors or [1.0] * len(self.objectives), self.objectives, strict=True)
        return tuple((factor * inner, term) for factor, objective in pairs for inner, term in objective.terms)


def per_token(
    lessons: Sequence[Lesson], values: Callable[[Lesson], Sequence[float]], like: Tensor
) -> Num[Tensor, " tokens"]:
    """Returns one value per learned token, lesson after lesson, on the device of `like`.

    Args:
        lessons: lessons of the micro-batch
        values: function from a lesson to one value per token of it
        like: any tensor on the wanted device
    """
    return torch.tensor(
        [value for lesson in lessons for value in values(lesson)[: lesson.num_learned]], device=like.device
    )


def capped_ratio(
    logprob: Float[Tensor, " tokens"], old_logprobs: Float[Tensor, " tokens"] | None, cap: float
) -> Float[Tensor, " tokens"]:
    """Returns min(exp(logprob - old_logprobs), cap) of every token; a ratio that overflows becomes `cap`."""
    if old_logprobs is None:
        raise ValueError("importance_cap needs the sampler's log-probs, got old_logprobs=None")
    return torch.exp(logprob - old_logprobs.to(logprob.dtype)).clamp(max=cap)
