"""This page is one step of on-policy self-distillation, as it runs.

    problems ─engine─> rollouts ─verifier─> groups ─[reflector]─> privilege ─> lessons        collect(): text half
    lessons ─policy, teacher─> states ─steering─> target ─objective─> loss, gradient          gradient(): tensor half

A *view* is what the teacher reads before the tokens of a rollout. *States* are the last hidden vectors of a model, one
per token; its output head, which student and teacher share unless they are two models, makes logits of them.
`ogls.records` has the records on the arrows, `ogls.methods` methods, `ogls.module` the optimiser, `ogls.data` the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ogls.lessons.build import LessonBuilder
from ogls.lessons.prompts import PromptEncoder
from ogls.lessons.reflection.reflector import ReflectionContext, ReflectionLimits
from ogls.loss.objective import States, Target, per_token
from ogls.loss.steering import Steered
from ogls.methods.base import Method
from ogls.policy.microbatch import micro_batches
from ogls.policy.policy import Policy
from ogls.policy.states import student_states, view_states
from ogls.records import Batch, Lesson, Problem, RolloutGroup
from ogls.rollout.accuracy import summarise
from ogls.rollout.refill import Refilling
from ogls.rollout.sampler import Sampler
from ogls.tasks.base import ErrorLocator


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes say how large the text half of a step is.

    Args:
        group_size: rollouts per problem
        max_tokens: largest number of tokens per rollout
        context_length: largest number of tokens of a prompt and its rollout together
        reflection: largest numbers of tokens per prompt and per reply of the reflector
    """

    group_size: int
    max_tokens: int
    context_length: int
    reflection: ReflectionLimits


def collect(
    method: Method,
    problems: Sequence[Problem],
    encoder: PromptEncoder,
    sampler: Sampler | Refilling | None,
    locator: ErrorLocator | None,
    sizes: Sizes,
    step: int,
    seed_of: Callable[[str], int],
) -> Batch:
    """Returns the lessons of one step: the student samples rollouts, they are graded, and the method chooses.

    Args:
        method: choice of rollouts and tokens that are learned, and of what the teacher reads about them
        problems: problems of this step, each of which gets one group of rollouts
        encoder: translation of text to token ids and back
        sampler: source of graded rollouts from the student's weights; None for a method that samples nothing
        locator: finder of the first error in a wrong rollout; with a reflector, the truth that it is measured against
        sizes: numbers of rollouts and tokens
        step: number of updates before this one
        seed_of: random seed of this step by purpose, ``rollouts`` or ``reflections``
    """
    prompts = [encoder.student(problem) for problem in problems]
    if sampler is None:
        groups = [
            RolloutGroup(problem=problem, prompt_ids=prompt, rollouts=(), policy_version=step)
            for problem, prompt in zip(problems, prompts, strict=True)
        ]
    else:
        drawn = method.sampling(sizes.max_tokens)
        groups = sampler.rollouts(problems, prompts, sizes.group_size, drawn, seed_of("rollouts"))
    measured = summarise(groups)
    if method.reflector is not None and sampler is not None:
        limits, seed = sizes.reflection, seed_of("reflections")
        context = ReflectionContext(encoder=encoder, ask=sampler.replies, seed=seed, limits=limits, truth=locator)
        with sampler.at_start("start" in method.needs and any(group.mixed for group in groups)):
            groups, rates = method.reflector.reflect(groups, context)
        measured |= rates
    builder = LessonBuilder(
        encoder=encoder,
        privilege=method.privilege,
        selection=method.selection,
        locator=locator,
        advantage=method.advantage,
        reflected=method.reflector is not None,
        context_length=sizes.context_length,
    )
    lessons, counts = builder.build(groups)
    return Batch(
        lessons=lessons,
        policy_version=step if sampler is None else sampler.version,
        groups=tuple(groups),
        metrics={f"train/{name}": value for name, value in (measured | counts).items()},
    )


@dataclass(frozen=True, kw_only=True)
class TermResult:
    """A term result is what one term made of a micro-batch; its share of the step's mean is value / total."""

    value: float
    total: float
    states: States
    per_token: Mapping[str, Float[Tensor, " tokens"]]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro-batch holds what its loss was computed from, for diagnostics: one result per term of the objective."""

    lessons: Sequence[Lesson]
    hidden_student: Float[Tensor, "tokens hidden"]
    targets: Mapping[Target | None, Steered]
    results: Sequence[TermResult]


def weight_totals(method: Method, lessons: Sequence[Lesson]) -> list[float]:
    """Returns, for each term of the objective, the sum of its token weights over all `lessons`."""
    return [sum(sum(term.token_weights(lesson)) for lesson in lessons) for _, term in method.objective.terms]


def gradient(
    method: Method,
    policy: Policy,
    policy_with: Mapping[str, Callable[[], AbstractContextManager[Policy]]],
    lessons: Sequence[Lesson],
    totals: Sequence[float],
    tokens_per_micro_batch: int,
    observe: Callable[[MicroBatch], None],
) -> float:
    """Adds the gradient of the loss to the policy's weights, and returns this process's share of the loss.

        loss = sum over terms of factor * (sum_t w_t loss_t) / (sum_t w_t)

    Both sums run over all tokens t of the step, so that the cut into micro-batches and processes makes no difference.

    Args:
        method: choice of what is minimised, and of how views become targets
        policy: student whose weights are improved
        policy_with: context manager for each value of `Target.weights`, which gives a model with those weights
        lessons: lessons of this process
        totals: second sum of each term, over all processes (`weight_totals`)
        tokens_per_micro_batch: budget of prompt and completion tokens in one forward and backward pass
        observe: function that is called with every micro-batch before its backward pass
    """
    loss, terms = 0.0, method.objective.terms
    for some in policy.in_step(micro_batches(lessons, tokens_per_micro_batch)):
        # The teacher reads every view, and the steering makes a target of what it says. There is no gradient yet.
        targets: dict[Target | None, Steered] = {
            target: _steered(target, method, policy, policy_with[target.weights], some, 2 * tokens_per_micro_batch)
            for target in method.targets
        }
        # The student reads its own prompt and the same tokens.
        hidden = student_states(policy, some)
        # Each term takes the tokens that count for it, and adds its share of the step's mean.
        with policy.agreed_memory():
            states, part, results = States.of(some, hidden, policy.head), hidden.new_zeros(()), []
            for (factor, term), total in zip(terms, totals, strict=True):
                steered = targets.get(term.target(method.steering))
                towards = states if steered is None else states.towards(steered)
                own = towards.weighted(per_token(some, term.token_weights, hidden))
                value, values = term(own)
                part = part + factor * value / (total or 1.0)
                results.append(TermResult(value=value.item(), total=total or 1.0, states=own, per_token=values))
            observe(MicroBatch(lessons=some, hidden_student=hidden.detach(), targets=targets, results=results))
        part.backward()
        loss += part.item()
    return loss


@torch.no_grad()
def _steered(
    target: Target,
    method: Method,
    policy: Policy,
    held: Callable[[], AbstractContextManager[Policy]],
    lessons: Sequence[Lesson],
    budget: int,
) -> Steered:
    """Returns a target for every learned token: the states of all views, added up by the steering."""
    taught = [term for _, term in method.objective.terms if term.target(method.steering) == target]
    num_scored = [max(term.num_scored(lesson) for term in taught) for lesson in lessons]
    with held() as reader:
        (anchor, direction), head = view_states(reader, target.steering, lessons, num_scored, budget), reader.lent_head
    with policy.agreed_memory():
        alpha = target.steering.strength(anchor, direction, policy.version, head or policy.head)
    return Steered(anchor=anchor, direction=direction, alpha=alpha, head=head)
