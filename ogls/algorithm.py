"""The step of on-policy self-distillation, on one page: this is the code that runs.

    problems ─engine─> rollouts ─verifier─> groups ─[reflector]─> privilege ─> lessons        collect(): text half
    lessons ─policy, teacher─> states ─steering─> target ─objective─> loss, gradient          gradient(): tensor half

What happens around it stands elsewhere: the optimiser in `ogls.module`, the order of the problems in `ogls.data`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
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
from ogls.rollout.sampler import Sampler
from ogls.tasks.base import ErrorLocator


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the text half of a step is.

    Args:
        group_size: rollouts per problem
        max_tokens: tokens per rollout at most
        context_length: tokens of prompt and rollout together at most
        reflection: tokens of the reflector's prompts and replies at most
    """

    group_size: int
    max_tokens: int
    context_length: int
    reflection: ReflectionLimits


def collect(
    method: Method,
    problems: Sequence[Problem],
    encoder: PromptEncoder,
    sampler: Sampler | None,
    locator: ErrorLocator | None,
    sizes: Sizes,
    step: int,
    seed_of: Callable[[str], int],
) -> Batch:
    """Returns the lessons that the student's present weights give on `problems`.

    Args:
        method: what is learned, and what the teacher reads
        problems: one group of rollouts each
        encoder: text to token ids and back
        sampler: what holds the student's weights, samples and grades; None for a method that samples nothing
        locator: what finds the first error of a wrong rollout, or measures how well the reflector does
        sizes: how many rollouts, how long
        step: number of updates before this one
        seed_of: the seed of this step's rollouts and reflections, by purpose
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
    if method.reflector is not None:
        assert sampler is not None
        context = ReflectionContext(
            encoder=encoder, ask=sampler.replies, seed=seed_of("reflections"), limits=sizes.reflection
        )
        groups, rates = method.reflector.reflect(groups, context, locator)
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
    """What a term made of a micro-batch: its share of the step's mean is value / total."""

    value: float
    total: float
    states: States
    per_token: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro-batch once its loss is there, for whoever measures it: one result per term of the objective."""

    lessons: Sequence[Lesson]
    hidden_student: Tensor
    targets: Mapping[Target, Steered]
    results: Sequence[TermResult]


def weight_totals(method: Method, lessons: Sequence[Lesson]) -> list[float]:
    """Returns the sum of all token weights of the step, for each term of the objective."""
    return [sum(sum(term.token_weights(lesson)) for lesson in lessons) for _, term in method.objective.terms]


def gradient(
    method: Method,
    policy: Policy,
    lent: Mapping[str, Callable[[], AbstractContextManager[None]]],
    lessons: Sequence[Lesson],
    totals: Sequence[float],
    tokens_per_micro_batch: int,
    observe: Callable[[MicroBatch], None],
) -> float:
    """Adds the gradient of the step's loss to the policy's weights, and returns the loss.

        loss = sum over terms of factor * (sum_t w_t loss_t) / (sum_t w_t)

    over all tokens of the step, whatever the micro-batches: `totals` are the second sums, of all processes.

    Args:
        method: what is minimised, and how views become targets
        policy: the student, at the version that is to be improved
        lent: gives the policy the weights that make a target while it is entered, by `Target.weights`
        lessons: what this process learns from
        totals: `weight_totals`, summed over all processes
        tokens_per_micro_batch: tokens of prompts and completions in one forward and backward pass
        observe: called with every micro-batch before its backward pass
    """
    loss, terms = 0.0, method.objective.terms
    for some in micro_batches(lessons, tokens_per_micro_batch):
        targets = {
            target: _steered(target, method, policy, lent[target.weights], some, 2 * tokens_per_micro_batch)
            for target in method.targets
        }
        hidden = student_states(policy, some)
        states = States.of(some, hidden, policy.head)
        part, results = hidden.new_zeros(()), []
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
    lent: Callable[[], AbstractContextManager[None]],
    lessons: Sequence[Lesson],
    budget: int,
) -> Steered:
    """The teacher reads every view of every lesson, and the steering adds up what it says."""
    taught = [term for _, term in method.objective.terms if term.target(method.steering) == target]
    num_scored = [max(term.num_scored(lesson) for term in taught) for lesson in lessons]
    with lent():
        anchor, direction = view_states(policy, target.steering, lessons, num_scored, budget)
    alpha = target.steering.strength(anchor, direction, policy.version, policy.head)
    return Steered(anchor=anchor, direction=direction, alpha=alpha)
