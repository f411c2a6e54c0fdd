"""The chain reflector knows the truth, since it recomputes arithmetic chains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ogls.lessons.reflection.reflector import ReflectionCase, ReflectionContext, Reflector
from ogls.records import Reflection
from ogls.tasks.chains import Chain, first_mistake


@dataclass(frozen=True, kw_only=True)
class ChainReflector(Reflector):
    """A chain reflector recomputes the problems of `Chains`, so its quotes and ideas are true.

    It knows the first wrong number, the line that holds it, and what to do instead.
    """

    def answer(
        self, cases: Sequence[ReflectionCase], context: ReflectionContext
    ) -> tuple[list[Reflection | None], dict[str, float]]:
        return [_reflection(case) for case in cases], {}


def _reflection(case: ReflectionCase) -> Reflection | None:
    if case.rollout.correct:
        return Reflection(idea=Chain.parse(case.problem.text).idea)
    mistake = first_mistake(case.problem, case.rollout.text)
    return None if mistake is None else Reflection(idea=mistake.idea, quote=mistake.quote, span=mistake.span)
