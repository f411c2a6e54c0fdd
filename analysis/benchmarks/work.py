"""What a step asks of a machine: a method's own code runs on stand-ins, and its passes and samples are counted.

Nothing here knows a method by name. `ogls.algorithm.collect` makes the lessons of the method that a configuration has,
with rollouts of one length of which every second is right; every character is a token. The passes are those that
student and teacher would make in these lessons' micro-batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ogls.algorithm import collect
from ogls.data import RolloutDataModule
from ogls.lessons.prompts import PromptEncoder, Prompts
from ogls.methods import Method
from ogls.policy.microbatch import micro_batches
from ogls.policy.policy import Policy
from ogls.policy.states import student_states, view_states
from ogls.records import Completion, Lesson, Problem, Rollout, RolloutGroup, Sampling, Span, Verdict
from ogls.rollout.sampler import Sampler
from ogls.tasks.base import ErrorLocator

SLIP = "7 + 5 = 11, which is 11."  # in the middle of every rollout; a reflector quotes it


@dataclass(frozen=True)
class Pass:
    """A pass reads so many tokens, which attend to so many pairs of tokens in all."""

    tokens: int
    pairs: int

    @classmethod
    def over(cls, prefixes: Sequence[Any], suffixes: Sequence[Any], owners: Sequence[int]) -> Pass:
        """Returns what `ogls.policy.packing` packs: a prefix that several suffixes share is read once."""
        shared = {owner for owner, count in Counter(owners).items() if count > 1}
        tokens = sum(len(prefixes[owner]) for owner in shared)
        pairs = sum(_causal(len(prefixes[owner])) for owner in shared)
        for suffix, owner in zip(suffixes, owners, strict=True):
            read, before = len(suffix) - 1, len(prefixes[owner])
            tokens += read + (0 if owner in shared else before)
            pairs += read * before + _causal(read) + (0 if owner in shared else _causal(before))
        return cls(tokens, pairs)


def _causal(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


@dataclass(frozen=True)
class Draw:
    """A draw is one call of the engine: completions of these lengths after prompts of these lengths, one each."""

    prompts: Sequence[int]
    lengths: Sequence[int]
    num_prompts: int  # of which are read

    def times(self, calls: int) -> Draw:
        """Returns as many draws in one call."""
        return Draw([*self.prompts] * calls, [*self.lengths] * calls, self.num_prompts * calls)


@dataclass
class Work:
    """Work is what one optimiser step does.

    Args:
        draws: calls of the engine; those that serve several steps have their share as weight
        teacher: passes of the teachers
        student: passes of the student, each with a gradient
        losses: learned tokens of each term, and how many products with the head each of them takes
        loads: times that the engine takes weights
    """

    draws: list[tuple[float, Draw]] = field(default_factory=list)
    teacher: list[Pass] = field(default_factory=list)
    student: list[Pass] = field(default_factory=list)
    losses: list[tuple[int, int]] = field(default_factory=list)
    loads: float = 0.0


class _Watch(Policy):
    """Stands for a policy, and keeps the passes that it is asked for."""

    head = torch.empty(1, 1), None  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.passes: list[Pass] = []
        self.version = 10**6  # a ramp of the steering has ended

    def hidden(self, prefixes: Any, suffixes: Any, owners: Any, share_prefixes: bool = True) -> torch.Tensor:
        owners = list(owners)
        self.passes.append(Pass.over(prefixes, suffixes, owners))
        return torch.zeros(sum(map(len, suffixes)), 1)


def learning(method: Method, lessons: Sequence[Lesson], budget: int) -> Work:
    """Returns the work of learning these lessons in micro-batches of `budget` tokens, as `ogls.algorithm` does it."""
    work, terms = Work(), [term for _, term in method.objective.terms]
    teacher, student = _Watch(), _Watch()
    for some in micro_batches(lessons, budget):
        for target in method.targets:
            taught = [term for term in terms if term.target(method.steering) == target]
            scored = [max(term.num_scored(lesson) for term in taught) for lesson in some]
            view_states(teacher, target.steering, some, scored, 2 * budget)
        student_states(student, some)
    work.teacher, work.student = teacher.passes, student.passes
    for term in terms:
        learned = sum(weight != 0 for lesson in lessons for weight in term.token_weights(lesson))
        work.losses.append((learned, 3 if term.target(method.steering) is not None else 2))
    return work


class _Letters(PromptEncoder):
    """Has a token for every character, and neither chat template nor tokenizer."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts

    def _encode(self, problem: Problem, text: str, options: dict[str, Any]) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def completion(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def decode_offsets(self, token_ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        return self.decode(token_ids), [(i, i + 1) for i in range(len(token_ids))]


class _Middle(ErrorLocator):
    """Finds the first error of every rollout in its middle."""

    def locate(self, problem: Problem, text: str) -> Span:
        start = text.index(SLIP)
        return start, start + len(SLIP)


class _StandIns(Sampler):
    """Stands for a sampler: rollouts of one length, right and wrong in turn, and replies that a reflector can read."""

    version = 0

    def __init__(self, length: int, reply: int) -> None:
        self.length, self.reply = length, reply
        self.draws: list[Draw] = []
        self.loads = 1

    def rollouts(
        self, problems: Sequence[Problem], prompts: Sequence[tuple[int, ...]], n: int, sampling: Sampling, seed: int
    ) -> list[RolloutGroup]:
        self.draws.append(
            Draw([len(prompt) for prompt in prompts for _ in range(n)], [self.length] * n * len(prompts), len(prompts))
        )
        return [
            RolloutGroup(
                problem=problem,
                prompt_ids=prompt,
                rollouts=tuple(self._rollout(i, right=i % 2 == 0) for i in range(n)),
                policy_version=0,
            )
            for problem, prompt in zip(problems, prompts, strict=True)
        ]

    @contextmanager
    def at_start(self, needed: bool) -> Iterator[None]:
        self.loads += 2 * needed  # the start's weights, and the present ones again
        yield

    def _rollout(self, number: int, right: bool) -> Rollout:
        half = (self.length - len(SLIP)) // 2
        text = f"{number:04}" + "." * (half - 4) + SLIP
        text += "." * (self.length - len(text))
        ids = tuple(map(ord, text))
        completion = Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), finish_reason="stop")
        verdict = Verdict(correct=right, status="graded", answer="1" if right else f"wrong {number}")
        return Rollout(completion=completion, text=text, verdict=verdict)

    def replies(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seed: int) -> list[Completion]:
        self.draws.append(Draw([len(prompt) for prompt in prompts], [self.reply] * len(prompts), len(prompts)))
        said = f"<quote>{SLIP}</quote><idea>Add the units first, then carry.</idea>".rjust(self.reply, ".")
        ids = tuple(map(ord, said))
        return [Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), finish_reason="stop")] * len(prompts)


def step_of(method: Method, data: RolloutDataModule, budget: int, prompt: int, fill: float) -> Work:
    """Returns the work of one optimiser step of a configuration.

    Args:
        method: method that learns
        data: sizes of its batches
        budget: tokens per micro-batch
        prompt: tokens of a problem
        fill: length of rollouts and replies as a share of the most that they may have; a reference solution is as long
            as a rollout
    """
    sizes = data.sizes
    length = max(2 * len(SLIP), round(fill * sizes.max_tokens))
    few = next(count for count in (4, 3, 2, 1) if data.problems_per_step % count == 0)  # all problems are alike
    problems = [
        Problem(id=str(i), text=f"{i:06}".ljust(prompt, "?"), answer="1", solution="s" * length) for i in range(few)
    ]
    sampler = _StandIns(length, max(len(SLIP) + 80, round(fill * sizes.reflection.max_tokens)))
    asks = "rollouts" in method.needs
    batch = collect(
        method,
        problems,
        _Letters(data.prompts),
        sampler if asks else None,
        _Middle(),
        sizes,
        step=0,
        seed_of=lambda purpose: 0,
    )
    if not batch.lessons:
        raise ValueError(f"{method.name} learns nothing from stand-ins")
    work = learning(method, batch.lessons, budget)
    times = data.problems_per_step // few
    work.teacher, work.student = work.teacher * times, work.student * times
    work.losses = [(tokens * times, products) for tokens, products in work.losses]
    # All mini-batches are sampled in one call.
    work.draws = [(1 / data.period, draw.times(times * data.mini_batches)) for draw in sampler.draws]
    work.loads = sampler.loads / data.period if asks else 0.0
    return work
