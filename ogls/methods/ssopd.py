"""SSOPD (arXiv 2605.17497) is GRPO and distils the shortest right rollout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ogls.lessons.advantage import Advantage, GroupRelative
from ogls.lessons.privilege import LessonDraft, Privilege, PrivilegedText
from ogls.lessons.prompts import ATTEMPT, Wording
from ogls.lessons.selection import FirstTokens, TokenSelection
from ogls.loss.divergence import ForwardKL
from ogls.loss.objective import Distillation, Mixture, Objective
from ogls.loss.policy_gradient import GRPO
from ogls.methods.base import Method
from ogls.records import Need, Role, RolloutGroup


@dataclass(frozen=True)
class ShortestForLongest(Privilege):
    """The teacher reads the shortest right rollout of a mixed group, about its longest wrong one.

    The lesson weighs 4 p (1 - p), where p is the share of right rollouts in the group.
    """

    views: ClassVar[Mapping[Role, Wording]] = {"success": ATTEMPT}
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts", "peers"})

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        if group.mixed:
            right = min(group.successes, key=lambda rollout: len(rollout.completion.token_ids))
            wrong = max(group.failures, key=lambda rollout: len(rollout.completion.token_ids))
            p = len(group.successes) / len(group.rollouts)
            texts = (PrivilegedText(role="success", text=right.text),)
            yield LessonDraft(rollout=wrong, texts=texts, weight=4.0 * p * (1.0 - p))


@dataclass(frozen=True, kw_only=True)
class SSOPD(Method):
    """SSOPD adds to GRPO a distillation of each group's longest wrong rollout, whose teacher reads the shortest right.

        loss = GRPO's + 0.5 * mean of KL(teacher(. | x, y+, y_<t) || student(. | x, y_<t)), weighted by 4 p (1 - p)

    y+ is the shortest right rollout, y the longest wrong one, and p the share of right ones; the teacher is frozen. The
    paper has, as its readers report, all of these, a clamp of each summand, and a cut of y; the sizes of clamp and cut
    could not be found. This project's decisions are OPSD's 1,024 tokens, OGLS-SD's clamp to ±0.05, and that the weights
    are those of a mean: they say how much a problem counts beside others, and do not lower the factor 0.5 where all
    groups are nearly all right or wrong.
    """

    privilege: Privilege = ShortestForLongest()
    objective: Objective = Mixture([GRPO(), Distillation(ForwardKL(), clip=0.05)], [1.0, 0.5])
    selection: TokenSelection = FirstTokens(1024)
    advantage: Advantage | None = GroupRelative()
