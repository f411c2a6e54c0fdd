"""Reflections become privileges: the teacher reads an idea, or a right rollout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ogls.lessons.privilege import LessonDraft, Privilege, PrivilegedText
from ogls.lessons.prompts import ATTEMPT, IDEA, Wording
from ogls.lessons.reflection.metrics import without_answer
from ogls.records import Need, Role, RolloutGroup


@dataclass(frozen=True)
class CorrectiveIdea(Privilege):
    """The teacher reads the idea of the rollout's own reflection and no solution (ROSD, arXiv 2605.28014).

    A rollout without a reflection gives nothing. The selection decides which tokens count; the paper's is `FromError`.

    Args:
        redact_answer: whether the gold answer is blotted out where an idea states it
    """

    redact_answer: bool = False
    views: ClassVar[Mapping[Role, Wording]] = {"idea": IDEA}
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts", "peers", "reflections"})

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for rollout in group.rollouts:
            if rollout.reflection is not None:
                idea = rollout.reflection.idea
                if self.redact_answer:
                    idea = without_answer(group.problem, idea)
                yield LessonDraft(rollout=rollout, texts=(PrivilegedText(role="idea", text=idea),))


@dataclass(frozen=True)
class LocatedSolution(Privilege):
    """The teacher reads a right rollout, while the reflection only locates the error: ROSD without its idea.

    The right rollout is another one of the same group; right rollouts take turns. A rollout without a reflection, or
    without such a peer, gives nothing.
    """

    views: ClassVar[Mapping[Role, Wording]] = {"success": ATTEMPT}
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts", "peers", "reflections"})

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for index, rollout in enumerate(group.rollouts):
            others = [right for right in group.successes if right is not rollout]
            if rollout.reflection is not None and others:
                text = others[index % len(others)].text
                yield LessonDraft(rollout=rollout, texts=(PrivilegedText(role="success", text=text),))
