"""SD-Zero (arXiv 2604.12002) has a teacher revise the student's own attempt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ogls.lessons.privilege import LessonDraft, Privilege, PrivilegedText
from ogls.lessons.prompts import Wording
from ogls.loss.divergence import ReverseKL
from ogls.loss.objective import Distillation, Objective
from ogls.methods.base import Method
from ogls.records import Role, RolloutGroup

REVISION = Wording(
    "revision",
    "{problem}\n\nYou have tried this problem before:\n{text}\n\n"
    "Reason step by step, and put your final answer in \\boxed{}.",
)
"""REVISION shows the teacher the student's own attempt, with a sentence on what to do with it."""


@dataclass(frozen=True)
class OwnVerdict(Privilege):
    """The teacher reads the rollout itself and whether it is right, but no solution and no other rollout.

    Args:
        right: text that follows a right rollout in the teacher's prompt
        wrong: text that follows a wrong rollout in the teacher's prompt
    """

    right: str = "This attempt is right. Say the same in other words."
    wrong: str = "This attempt is wrong. Correct it."
    views: ClassVar[Mapping[Role, Wording]] = {"revision": REVISION}

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for rollout in group.rollouts:
            text = f"{rollout.text}\n\n{self.right if rollout.correct else self.wrong}"
            yield LessonDraft(rollout=rollout, texts=(PrivilegedText(role="revision", text=text),))


@dataclass(frozen=True, kw_only=True)
class SDZero(Method):
    """SD-Zero, phase 2, distils a frozen teacher that reads the rollout y and its verdict r, on every rollout.

        loss = mean_t KL(student(. | x, y_<t) || teacher(. | x, y, r, y_<t))        at temperature 1

    The formula is the paper's; the released script adds half of the forward KL to half of the reverse one, over the 64
    likeliest tokens. In the paper, student and teacher begin as a model that phase 1 has trained to revise after two
    fixed phrases, which follow y in the reply. This project has no phase 1 and begins with any model. Its decisions are
    the words around y, and that y stands in the question.
    """

    privilege: Privilege = OwnVerdict()
    objective: Objective = Distillation(ReverseKL())
