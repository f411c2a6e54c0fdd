"""Feedback lets the teacher read what the verifier said of a wrong rollout, beside what else it reads (SDPO)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ogls.lessons.privilege import LessonDraft, Privilege, PrivilegedText
from ogls.lessons.prompts import FEEDBACK, Wording
from ogls.records import Need, Role, Rollout, RolloutGroup


@dataclass(frozen=True)
class Feedback(Privilege):
    """The teacher of a wrong rollout reads what was said of it, behind the problem in each view.

    What was said is `Verdict.feedback`, or of a rollout that the length limit cut off, that it is too long. Right
    rollouts are learned as the other privilege has it. A wrong rollout for which that has nothing, as where no peer is
    right, is learned with the feedback alone, in the words of the student's prompt.

    Args:
        beside: privilege whose views show the feedback, too; null for the feedback alone
        alone: whether a wrong rollout for which the other privilege has nothing is learned with the feedback alone
        only_alone: whether views of the other privilege are left without feedback
        tell_answer: whether the feedback ends with the gold answer

    Raises:
        ValueError: the other privilege has no views, or several kinds of them, none of which feedback alone could be.
    """

    beside: Privilege | None = None
    alone: bool = True
    only_alone: bool = False
    tell_answer: bool = False

    def __post_init__(self) -> None:
        if self.beside is None:
            return
        name, roles = type(self.beside).__name__, sorted(self.beside.views)
        if not roles:
            raise ValueError(f"Feedback stands in another privilege's views, but {name} has none: set beside to null")
        if self.alone and len(roles) > 1:
            raise ValueError(f"feedback alone cannot be all of {roles}, which {name} has: set privilege.alone to false")

    @property
    def views(self) -> Mapping[Role, Wording]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns the views of the other privilege, in which the feedback stands, or one of its own."""
        return {"feedback": FEEDBACK} if self.beside is None else self.beside.views

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns what the other privilege needs; the feedback alone needs rollouts."""
        return frozenset({"rollouts"}) if self.beside is None else self.beside.needs

    @property
    def selects(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns whether the other privilege chooses among rollouts."""
        return self.beside is not None and self.beside.selects

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        learned: list[Rollout | None] = []
        for draft in self.beside.drafts(group) if self.beside is not None else ():
            learned.append(draft.rollout)
            said = "" if self.only_alone else self._said(group, draft.rollout)
            yield replace(draft, texts=tuple(replace(text, feedback=said) for text in draft.texts)) if said else draft
        for rollout in group.failures if self.alone or self.beside is None else ():
            said = self._said(group, rollout)
            if said and not any(rollout is other for other in learned):
                (role,) = self.views
                yield LessonDraft(rollout=rollout, texts=(PrivilegedText(role=role, text=None, feedback=said),))

    def _said(self, group: RolloutGroup, rollout: Rollout | None) -> str:
        if rollout is None or rollout.correct or not rollout.feedback:
            return ""
        return (
            f"{rollout.feedback} The right answer is {group.problem.answer}." if self.tell_answer else rollout.feedback
        )
