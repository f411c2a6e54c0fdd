"""A reflector explains rollouts; this is its interface, and what it is asked."""

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
    """A reflection case is one rollout to reflect on.

    Args:
        problem: problem that the rollout answers
        rollout: rollout to reflect on
        solution: text of a right rollout of the same group, to compare a wrong one with; empty for a right one
    """

    problem: Problem
    rollout: Rollout
    solution: str = ""


@dataclass(frozen=True, kw_only=True)
class ReflectionLimits:
    """Reflection limits say how long a reflector's prompts and replies may be.

    Args:
        prompt_tokens: largest number of tokens per prompt of the reflector; in a longer one the solution loses its
            middle, then the rollout its end
        max_tokens: largest number of tokens per reply of the reflector
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
    """A reflection context is what a reflector works with during one step.

    Args:
        encoder: encoder of text to token ids and back
        ask: function ``ask(prompts, sampling, seed)`` by which a language model continues every prompt once; it has the
            weights that the reflector needs
        seed: seed of this step's reflections alone
        limits: largest lengths of prompts and replies
        truth: locator of the true errors, against which reflections are measured; None where there is none
    """

    encoder: PromptEncoder
    ask: Callable[[Sequence[tuple[int, ...]], Sampling, int], list[Completion]]
    seed: int
    limits: ReflectionLimits
    truth: ErrorLocator | None = None


@dataclass(frozen=True, kw_only=True)
class Reflector(ABC):
    """A reflector says where wrong rollouts first go wrong, and names the idea that each rollout needs.

    Only groups with both outcomes are reflected on: without a right rollout there is nothing to compare with, without a
    wrong one there is nothing to correct. Right rollouts of one group take turns as the solution to compare with.

    Args:
        right_rollouts: whether right rollouts are reflected on, too; all their tokens are then distilled
        shuffle_ideas: whether, as a control, every rollout gets an idea for another problem's rollout of the same
            outcome
    """

    right_rollouts: bool = True
    shuffle_ideas: bool = False

    @property
    def needs(self) -> frozenset[Need]:
        """Returns what the reflector asks of the run, such as ``replies`` of a language model."""
        return frozenset()

    @abstractmethod
    def answer(
        self, cases: Sequence[ReflectionCase], context: ReflectionContext
    ) -> tuple[list[Reflection | None], dict[str, float]]:
        """Returns one reflection per case, None where none was obtained, and measurements by name."""

    @timed("reflect")
    def reflect(
        self, groups: Sequence[RolloutGroup], context: ReflectionContext
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        """Returns the groups with their reflections, and measurements by name.

        Args:
            groups: rollout groups, of which those with both outcomes are reflected on
            context: what the reflector works with
        """
        cases, places = [], []
        for place, group in enumerate(groups):
            if group.mixed:
                own = self._cases(group)
                cases += own.values()
                places += [(place, index) for index in own]
        found, measured = self.answer(cases, context) if cases else ([], {})
        measured |= report(
            [(c.problem, c.rollout, r) for c, r in zip(cases, found, strict=True)], context.encoder, context.truth
        )
        if self.shuffle_ideas:
            found = exchange_ideas(cases, found)
        rollouts = [list(group.rollouts) for group in groups]
        for (place, index), reflection in zip(places, found, strict=True):
            rollouts[place][index] = replace(rollouts[place][index], reflection=reflection)
        return [replace(g, rollouts=tuple(new)) for g, new in zip(groups, rollouts, strict=True)], measured

    def _cases(self, group: RolloutGroup) -> dict[int, ReflectionCase]:
        """Returns the cases of a group by the index of their rollout."""
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
    """Returns the reflections with their ideas exchanged between problems, as a control.

    Every idea comes from the next problem that has a reflection on a rollout of the same outcome. A reflection becomes
    None where no other problem has one. Located errors stay where they are.
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
