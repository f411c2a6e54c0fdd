"""The exact reflector knows the truth, since it asks a locator that recomputes the problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ogls.lessons.reflection.reflector import ReflectionCase, ReflectionContext, Reflector
from ogls.records import Need, Reflection
from ogls.tasks.base import MistakeLocator


@dataclass(frozen=True, kw_only=True)
class ExactReflector(Reflector):
    """An exact reflector says what the run's locator knows, so its quotes and ideas are true.

    The locator has to know ideas, too: `ChainErrors` for `Chains`, `FamilyErrors` for `Families`.
    """

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"ideas"})

    def answer(
        self, cases: Sequence[ReflectionCase], context: ReflectionContext
    ) -> tuple[list[Reflection | None], dict[str, float]]:
        if not isinstance(context.truth, MistakeLocator):
            raise ValueError(f"an exact reflector needs a locator that knows ideas, got {context.truth!r}")
        return [_reflection(case, context.truth) for case in cases], {}


def _reflection(case: ReflectionCase, truth: MistakeLocator) -> Reflection | None:
    if case.rollout.correct:
        return Reflection(idea=truth.idea(case.problem))
    mistake = truth.mistake(case.problem, case.rollout.text)
    return None if mistake is None else Reflection(idea=mistake.idea, quote=mistake.quote, span=mistake.span)
