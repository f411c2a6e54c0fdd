"""U-OPSD (arXiv 2608.06296) distils the answer that most rollouts agree on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ogls.lessons.privilege import LessonDraft, Privilege, PrivilegedText
from ogls.lessons.prompts import ATTEMPT, Wording
from ogls.lessons.selection import AllTokens, TokenSelection
from ogls.methods.opsd import OPSD
from ogls.records import Need, Role, Rollout, RolloutGroup


@dataclass(frozen=True)
class Consensus(Privilege):
    """The teacher reads a rollout with the group's most frequent answer, about the longest with another answer.

    Nobody looks at which answer is right. Rollouts that are cut off or have no answer do not vote and are not learned.
    Of answers that are equally frequent, the one that was sampled first wins.

    Args:
        threshold: share of all rollouts that have to give the most frequent answer
        num_learned: number of rollouts with another answer that are learned, the longest first
        reads: which of the rollouts with the most frequent answer the teacher reads, ``longest`` or ``shortest``

    Raises:
        ValueError: a number is out of its range.
    """

    threshold: float = 0.5
    num_learned: int = 1
    reads: Literal["longest", "shortest"] = "longest"
    views: ClassVar[Mapping[Role, Wording]] = {"success": ATTEMPT}
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts", "peers", "answers"})

    def __post_init__(self) -> None:
        if not (0.0 <= self.threshold <= 1.0 and self.num_learned >= 1):
            raise ValueError(
                f"Consensus needs threshold in [0, 1] and num_learned >= 1, got {self.threshold}, {self.num_learned}"
            )

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        votes: dict[str, list[Rollout]] = defaultdict(list)
        for rollout in group.rollouts:
            if rollout.verdict.answer is not None and not rollout.truncated:
                votes[rollout.verdict.answer].append(rollout)
        agreeing = max(votes.values(), key=len, default=[])
        if not agreeing or len(agreeing) < self.threshold * len(group.rollouts):
            return
        peer = (max if self.reads == "longest" else min)(agreeing, key=_length)
        others = [rollout for same in votes.values() if same is not agreeing for rollout in same]
        for rollout in sorted(others, key=_length, reverse=True)[: self.num_learned]:
            yield LessonDraft(rollout=rollout, texts=(PrivilegedText(role="success", text=peer.text),))


def _length(rollout: Rollout) -> int:
    return len(rollout.completion.token_ids)


@dataclass(frozen=True, kw_only=True)
class U_OPSD(OPSD):
    """U-OPSD is OPSD whose teacher reads the student's most frequent answer in place of a reference solution.

        loss = mean_t KL(teacher(. | x, y+, y_<t) || student(. | x, y_<t))

    y+ is the longest of the rollouts with the most frequent answer, if at least half of all rollouts give it; y is the
    longest rollout with another answer. The paper has, as its readers report, 8 rollouts of at most 4,096 tokens per
    problem, the threshold of 0.5, ablations around one learned rollout per problem, and all else as in OPSD. Its first
    abstract calls y+ the shortest, its method section the longest, and its ablation finds little difference. This
    project's decision is that all tokens of y are learned.
    """

    privilege: Privilege = Consensus()
    selection: TokenSelection = AllTokens()
