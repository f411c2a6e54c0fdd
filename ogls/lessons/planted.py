"""A style is planted in what the teacher reads, to measure how much of it the student learns."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ogls.lessons.privilege import LessonDraft, Privilege, PrivilegedText
from ogls.lessons.prompts import Wording
from ogls.records import Need, Problem, Role, RolloutGroup
from ogls.system.ranges import check
from ogls.system.seeds import derive

_BOXED = re.compile(r"\\boxed\{[^{}]*\}")


@dataclass(frozen=True)
class AnswersAlone(Privilege):
    """A share of the texts in view is the answer alone, without work: a style that a student may copy.

    An attempt becomes its own boxed answer, right or wrong; one without such an answer stays. An idea has no answer of
    its own, and becomes the gold answer, as when a reflector tells it. Each text is drawn by itself, by problem and
    step alone, and with a larger share all those that a smaller one has drawn.

    Args:
        privilege: choice of the rollouts that are learned from, and of what is read about each
        share: probability of each text to become the answer alone
        roles: roles of the texts that are drawn from; null takes all
    """

    privilege: Privilege
    share: float
    roles: list[Role] | None = None

    def __post_init__(self) -> None:
        check(self, {"share": "[0, 1]"})
        strange = sorted(set(self.roles or ()) - self.privilege.views.keys())
        if strange:
            raise ValueError(f"AnswersAlone: expected roles of {sorted(self.privilege.views)}, got {strange}")

    @property
    def views(self) -> Mapping[Role, Wording]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.privilege.views

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.privilege.needs

    @property
    def plain(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.privilege.plain

    @property
    def selects(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.privilege.selects

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        rng = random.Random(derive("planted", group.problem.id, group.policy_version))
        for draft in self.privilege.drafts(group):
            drawn = [rng.random() < self.share for _ in draft.texts]
            texts = [self._cut(t, group.problem) if d else t for t, d in zip(draft.texts, drawn, strict=True)]
            yield replace(draft, texts=tuple(texts))

    def _cut(self, text: PrivilegedText, problem: Problem) -> PrivilegedText:
        if self.roles is not None and text.role not in self.roles:
            return text
        answers = [f"\\boxed{{{problem.answer}}}"] if text.role == "idea" else _BOXED.findall(text.text or "")
        return replace(text, text=answers[-1]) if answers else text
