"""The reflector that knows: it recomputes arithmetic chains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ogls.chains import Chain, first_mistake
from ogls.records import Reflection
from ogls.reflection.base import Case, Means, Reflector


@dataclass(frozen=True, kw_only=True)
class ChainReflector(Reflector):
    """Ground truth for `ogls.chains.Chains`: the first wrong number, the line it stands in, and what to do instead."""

    def answer(self, cases: Sequence[Case], means: Means) -> tuple[list[Reflection | None], dict[str, float]]:
        return [_reflection(case) for case in cases], {}


def _reflection(case: Case) -> Reflection | None:
    if case.rollout.correct:
        return Reflection(idea=Chain.parse(case.problem.text).idea)
    mistake = first_mistake(case.problem, case.rollout.text)
    return None if mistake is None else Reflection(idea=mistake.idea, quote=mistake.quote, span=mistake.span)
