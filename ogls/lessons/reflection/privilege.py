"""What the teacher reads when rollouts have been reflected on."""

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
    """ROSD (arXiv 2605.28014): the teacher reads the idea of the rollout's own reflection, and no solution.

    A rollout without a reflection gives nothing. Which tokens count is up to the selection; published is `FromError`.

    Args:
        redact_answer: blot out the gold answer where the idea states it.
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
    """ROSD without its idea: the error is located by reflection, and the teacher reads a right rollout of the group.

    It is never the rollout itself; right rollouts take turns. A rollout without a reflection gives nothing.
    """

    views: ClassVar[Mapping[Role, Wording]] = {"success": ATTEMPT}
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts", "peers", "reflections"})

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for index, rollout in enumerate(group.rollouts):
            others = [right for right in group.successes if right is not rollout]
            if rollout.reflection is not None and others:
                text = others[index % len(others)].text
                yield LessonDraft(rollout=rollout, texts=(PrivilegedText(role="success", text=text),))
