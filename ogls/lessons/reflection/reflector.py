"""What a reflector is, and which rollouts it is asked about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ogls.lessons.prompts import PromptEncoder
from ogls.lessons.reflection.metrics import report
from ogls.records import Completion, Need, Problem, Reflection, Rollout, RolloutGroup, Sampling
from ogls.system.step_metrics import timed
from ogls.tasks.base import ErrorLocator


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflectionCase:
    """A rollout to reflect on. `solution` is the text of a right rollout of the same group; empty for a right one."""

    problem: Problem
    rollout: Rollout
    solution: str = ""


@dataclass(frozen=True, kw_only=True)
class ReflectionLimits:
    """How long a reflector's prompts and replies may be.

    Args:
        prompt_tokens: of a prompt; the solution is shortened in its middle for it, then the rollout at its end
        max_tokens: of a reply
    """

    prompt_tokens: int = 2048
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.max_tokens < 1:
            raise ValueError(
                f"expected prompt_tokens and max_tokens of at least 1, got {self.prompt_tokens} and {self.max_tokens}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflectionContext:
    """What a reflector works with.

    Args:
        encoder: text to token ids and back
        ask: ``ask(prompts, sampling, seed, frozen)`` has a language model continue every prompt once, with the
            student's present weights or with those that training began with
        seed: for this step's reflections alone
        limits: how long prompts and replies may be
    """

    encoder: PromptEncoder
    ask: Callable[[Sequence[tuple[int, ...]], Sampling, int, bool], list[Completion]]
    seed: int
    limits: ReflectionLimits


@dataclass(frozen=True, kw_only=True)
class Reflector(ABC):
    """Says where wrong rollouts first go wrong, and names the idea of each rollout.

    Only groups with both outcomes are reflected on: where none is right there is nothing to compare with, where all are
    there is nothing to correct. Right rollouts of one group take turns as the solution that is compared with.

    Args:
        right_rollouts: reflect on right rollouts too, so that they are distilled, whole.
        shuffle_ideas: a control: every rollout is given the idea for another problem's rollout of the same outcome.
    """

    right_rollouts: bool = True
    shuffle_ideas: bool = False

    @property
    def needs(self) -> frozenset[Need]:
        """What it asks of the run: ``replies`` of a language model, of the weights that training ``start``-ed with."""
        return frozenset()

    @abstractmethod
    def answer(
        self, cases: Sequence[ReflectionCase], context: ReflectionContext
    ) -> tuple[list[Reflection | None], dict[str, float]]:
        """One reflection for each case, None where there is none to be had, and what was measured on the way."""

    @timed("reflect")
    def reflect(
        self, groups: Sequence[RolloutGroup], context: ReflectionContext, truth: ErrorLocator | None
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        """The groups with their reflections, and rates; `truth` is what located errors are measured against."""
        cases, places = [], []
        for place, group in enumerate(groups):
            if group.mixed:
                own = self._cases(group)
                cases += own.values()
                places += [(place, index) for index in own]
        found, measured = self.answer(cases, context) if cases else ([], {})
        measured |= report(
            [(c.problem, c.rollout, r) for c, r in zip(cases, found, strict=True)], context.encoder, truth
        )
        if self.shuffle_ideas:
            found = exchange_ideas(cases, found)
        rollouts = [list(group.rollouts) for group in groups]
        for (place, index), reflection in zip(places, found, strict=True):
            rollouts[place][index] = replace(rollouts[place][index], reflection=reflection)
        return [replace(g, rollouts=tuple(new)) for g, new in zip(groups, rollouts, strict=True)], measured

    def _cases(self, group: RolloutGroup) -> dict[int, ReflectionCase]:
        """By the rollout's index in its group."""
        cases, wrong = {}, 0
        for index, rollout in enumerate(group.rollouts):
            if not rollout.correct:
                solution = group.successes[wrong % len(group.successes)].text
                cases[index] = ReflectionCase(problem=group.problem, rollout=rollout, solution=solution)
                wrong += 1
            elif self.right_rollouts:
                cases[index] = ReflectionCase(problem=group.problem, rollout=rollout)
        return cases


def exchange_ideas(cases: Sequence[ReflectionCase], found: Sequence[Reflection | None]) -> list[Reflection | None]:
    """Every idea from the next problem that has one of the same outcome; None where no other problem has.

    What was located stays where it is.
    """
    exchanged: list[Reflection | None] = [None] * len(found)
    for correct in (False, True):
        owners: dict[str, list[tuple[int, Reflection]]] = {}
        for index, (case, reflection) in enumerate(zip(cases, found, strict=True)):
            if reflection is not None and case.rollout.correct == correct:
                owners.setdefault(case.problem.id, []).append((index, reflection))
        problems = list(owners.values())
        for own, others in zip(problems, problems[1:] + problems[:1], strict=True):
            if own is not others:
                for turn, (index, reflection) in enumerate(own):
                    exchanged[index] = replace(reflection, idea=others[turn % len(others)][1].idea)
    return exchanged
