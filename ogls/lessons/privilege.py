"""What the teacher reads: from groups of rollouts to drafts of lessons.

A privilege decides which rollouts are learned from and which views the teacher takes of each. Here are strings only;
`ogls.lessons.build` turns a draft into token ids and weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, Literal, TypeVar

from ogls.lessons.prompts import ATTEMPT, Wording
from ogls.lessons.selection import LastTokens, TokenSelection
from ogls.records import Need, Role, Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivilegedText:
    """A privileged text is what only the teacher reads, and the part that it plays in the steering."""

    role: Role
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflectionTask:
    """A reflection task asks where a wrong attempt goes wrong, or why a right one is right."""

    attempt: str
    correct: bool
    solution: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LessonDraft:
    """A draft is a lesson that has no token ids yet.

    Args:
        rollout: sampled text that is learned; exactly one of `rollout` and `demonstration` is given
        demonstration: written text that is learned
        texts: what the teacher reads, one view each, beside the plain one
        prompt: what the student itself reads instead of the plain problem (cold start only)
        selection: which tokens count, where it is not for the method to say
        weight: factor of all token weights of this lesson
    """

    rollout: Rollout | None = None
    demonstration: str | None = None
    texts: tuple[PrivilegedText, ...] = ()
    prompt: PrivilegedText | ReflectionTask | None = None
    selection: TokenSelection | None = None
    weight: float = 1.0


class Privilege(ABC):
    """A privilege says which rollouts of a group are learned from, and what the teacher reads about each.

    A group without a signal gives no draft, so that nothing is ever averaged over nothing.
    """

    views: ClassVar[Mapping[Role, Wording]] = {}
    """The roles of the texts that a draft gives the teacher, each with the words around it; all of them or none."""
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts"})

    @abstractmethod
    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        """Yields what is learned from this group."""


@dataclass(frozen=True)
class Demonstration(Privilege):
    """SFT: likelihood of the reference solution; nothing is sampled."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        if group.problem.solution is not None:
            yield LessonDraft(demonstration=group.problem.solution)


@dataclass(frozen=True)
class ReferenceSolution(Privilege):
    """OPSD (arXiv 2601.18734): the teacher reads the reference solution s.

    Args:
        rollouts: ``all`` as published, or only the ``wrong`` ones.
    """

    rollouts: Literal["all", "wrong"] = "all"
    views: ClassVar[Mapping[Role, Wording]] = {"success": ATTEMPT}

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        if group.problem.solution is None:
            return
        texts = (PrivilegedText(role="success", text=group.problem.solution),)
        for rollout in group.rollouts if self.rollouts == "all" else group.failures:
            yield LessonDraft(rollout=rollout, texts=texts)


@dataclass(frozen=True)
class Unprivileged(Privilege):
    """Nobody reads anything: rollouts are learned by their advantages alone (GRPO)."""

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        return iter(())


@dataclass(frozen=True)
class SuccessfulPeer(Privilege):
    """SDPO (arXiv 2601.20802) where the environment says no more than right or wrong: the teacher reads a right peer.

    A peer is another rollout of the group, never the rollout itself, even if the texts are the same. Right rollouts
    take turns as peers. A rollout without a right peer gives nothing.

    Args:
        rollouts: ``all`` as published, or only the ``wrong`` ones.
        solution_as_peer: a rollout without a right peer reads the reference solution, if there is one.
    """

    rollouts: Literal["all", "wrong"] = "all"
    solution_as_peer: bool = False
    views: ClassVar[Mapping[Role, Wording]] = {"success": ATTEMPT}
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts", "peers"})

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for kind in (group.successes if self.rollouts == "all" else (), group.failures):
            for index, rollout in enumerate(kind):
                peers = [peer.text for peer in _rotated(group.successes, index) if peer is not rollout]
                text = peers[0] if peers else group.problem.solution if self.solution_as_peer else None
                if text is not None:
                    yield LessonDraft(rollout=rollout, texts=(PrivilegedText(role="success", text=text),))


@dataclass(frozen=True)
class ShortSuccesses(Privilege):
    """OGLS-SD v2 (arXiv 2605.12400): likelihood on the last tokens of short right rollouts, against growing length.

    Short is shorter than the median of the group. The paper gives neither the median nor the weight. For use beside
    another privilege, in `Several`, with an objective that has a `Likelihood` in its mixture.

    Args:
        count: tokens at the end of a rollout that are learned.
    """

    count: int = 128
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts", "peers"})

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        middle = median(len(rollout.completion.token_ids) for rollout in group.rollouts)
        for rollout in group.successes:
            if len(rollout.completion.token_ids) < middle:
                yield LessonDraft(rollout=rollout, selection=LastTokens(self.count))


@dataclass(frozen=True)
class PeerOutcomes(Privilege):
    """OGLS-SD (arXiv 2605.12400, algorithm 1): success pool P+ and failure pool P- for every wrong rollout.

        P+ = {reference solution, if there is one} + {right rollouts}        P- = {wrong rollouts}

    All-right groups and groups with an empty pool give nothing; an all-wrong group still trains when s exists.

    Args:
        max_peers: views a pool at most; null takes all, as published. A limited pool is rotated: the rollout's own
            place in it comes first, so that all members are used evenly.
        exclude_self: leave the rollout itself out of its own pool (published: it is in).
        use_solution: put the reference solution into P+.
        truncated_failures: keep unfinished rollouts in P-.
        learn_successes: learn right rollouts too, of groups that have a wrong one (published: only wrong ones).
    """

    max_peers: int | None = None
    exclude_self: bool = False
    use_solution: bool = True
    truncated_failures: bool = True
    learn_successes: bool = False
    views: ClassVar[Mapping[Role, Wording]] = {"success": ATTEMPT, "failure": ATTEMPT}
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts", "peers"})

    def __post_init__(self) -> None:
        if self.max_peers is not None and self.max_peers < 1:
            raise ValueError(f"max_peers must be at least 1, got {self.max_peers}")

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        if not group.failures:
            return
        solution = [group.problem.solution] if self.use_solution and group.problem.solution is not None else []
        failures = [r for r in group.failures if self.truncated_failures or not r.truncated]
        for kind in (group.successes if self.learn_successes else (), group.failures):
            for index, rollout in enumerate(kind):
                right = self._pool([*solution, *group.successes], rollout, index)
                wrong = self._pool(failures, rollout, index)
                if right and wrong:
                    texts = [PrivilegedText(role="success", text=text) for text in right]
                    texts += [PrivilegedText(role="failure", text=text) for text in wrong]
                    yield LessonDraft(rollout=rollout, texts=tuple(texts))

    def _pool(self, pool: Sequence[Rollout | str], own: Rollout, index: int) -> list[str]:
        """The pool from the rollout's own place in it on, or from `index` if it has none."""
        start = next((i for i, member in enumerate(pool) if member is own), index)
        # Without itself, the next one is at the same place.
        members = [m for m in pool if not (self.exclude_self and m is own)]
        texts = [member if isinstance(member, str) else member.text for member in _rotated(members, start)]
        return texts[: self.max_peers]


@dataclass(frozen=True)
class Several(Privilege):
    """All drafts of several privileges. Those that have views need the same roles, for one steering serves them all."""

    privileges: list[Privilege]

    def __post_init__(self) -> None:
        object.__setattr__(self, "privileges", list(self.privileges))  # a tuple is as good
        if not self.privileges:
            raise ValueError("Several needs at least one privilege, got none")
        different = sorted({tuple(sorted(privilege.views)) for privilege in self.privileges if privilege.views})
        if len(different) > 1:
            raise ValueError(f"Several needs privileges with views of the same roles, got {different}")

    @property
    def views(self) -> Mapping[Role, Wording]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {role: wording for privilege in self.privileges for role, wording in privilege.views.items()}

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset().union(*(privilege.needs for privilege in self.privileges))

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for privilege in self.privileges:
            yield from privilege.drafts(group)


T = TypeVar("T")


def _rotated(members: Sequence[T], by: int) -> list[T]:
    by %= max(1, len(members))
    return [*members[by:], *members[:by]]
