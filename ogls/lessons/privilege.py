"""What the teacher reads: from groups of rollouts to drafts of lessons.

A privilege decides which rollouts are learned from and which views the teacher takes of each. Here are strings only;
`ogls.lessons.build` turns a draft into token ids and weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, Literal, TypeVar

from ogls.lessons.selection import LastTokens, TokenSelection
from ogls.records import Role, Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivilegedText:
    """A privileged text and the part it plays."""

    role: Role
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflectionTask:
    """What a reflector is asked: where does this wrong attempt go wrong, or why is this right one right?"""

    attempt: str
    correct: bool
    solution: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LessonDraft:
    """A lesson before it has token ids.

    Exactly one of `rollout` (sampled) and `demonstration` (written) is what is learned. `hints` are the teacher's
    privileged views beside the plain one. `prompt` is what the student itself reads instead of the plain problem (cold
    start only). `selection` says which tokens count, where it is not for the run to say.
    """

    rollout: Rollout | None = None
    demonstration: str | None = None
    hints: tuple[PrivilegedText, ...] = ()
    prompt: PrivilegedText | ReflectionTask | None = None
    selection: TokenSelection | None = None


class Privilege(ABC):
    """Groups in, drafts out. A group without a signal gives no draft, so nothing is ever averaged over nothing."""

    samples_rollouts: ClassVar[bool] = True
    roles: ClassVar[frozenset[Role]] = frozenset()
    """Roles of the views that a draft has beside the plain one; all of them, or no view at all."""
    min_group_size: ClassVar[int] = 1
    needs_reflector: ClassVar[bool] = False

    @abstractmethod
    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        """What to learn from this group."""


@dataclass(frozen=True)
class Demonstration(Privilege):
    """SFT: likelihood of the reference solution; nothing is sampled."""

    samples_rollouts: ClassVar[bool] = False

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
    roles: ClassVar[frozenset[Role]] = frozenset({"success"})

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        if group.problem.solution is None:
            return
        hints = (PrivilegedText(role="success", text=group.problem.solution),)
        for rollout in group.rollouts if self.rollouts == "all" else group.failures:
            yield LessonDraft(rollout=rollout, hints=hints)


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
    roles: ClassVar[frozenset[Role]] = frozenset({"success"})
    min_group_size: ClassVar[int] = 2

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for kind in (group.successes if self.rollouts == "all" else (), group.failures):
            for index, rollout in enumerate(kind):
                peers = [peer.text for peer in _rotated(group.successes, index) if peer is not rollout]
                text = peers[0] if peers else group.problem.solution if self.solution_as_peer else None
                if text is not None:
                    yield LessonDraft(rollout=rollout, hints=(PrivilegedText(role="success", text=text),))


@dataclass(frozen=True)
class ShortSuccesses(Privilege):
    """OGLS-SD v2 (arXiv 2605.12400): likelihood on the last tokens of short right rollouts, against growing length.

    Short is shorter than the median of the group. The paper gives neither the median nor the weight. For use beside
    another privilege, in `Several`, with an objective that has a `Likelihood` in its mixture.

    Args:
        count: tokens at the end of a rollout that are learned.
    """

    count: int = 128
    min_group_size: ClassVar[int] = 2

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
    roles: ClassVar[frozenset[Role]] = frozenset({"success", "failure"})
    min_group_size: ClassVar[int] = 2

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
                    hints = [PrivilegedText(role="success", text=text) for text in right]
                    hints += [PrivilegedText(role="failure", text=text) for text in wrong]
                    yield LessonDraft(rollout=rollout, hints=tuple(hints))

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

    privileges: tuple[Privilege, ...]

    def __post_init__(self) -> None:
        if not self.privileges:
            raise ValueError("Several needs at least one privilege, got none")
        different = sorted({tuple(sorted(privilege.roles)) for privilege in self.privileges if privilege.roles})
        if len(different) > 1:
            raise ValueError(f"Several needs privileges with views of the same roles, got {different}")

    @property
    def roles(self) -> frozenset[Role]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset().union(*(privilege.roles for privilege in self.privileges))

    @property
    def min_group_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return max(privilege.min_group_size for privilege in self.privileges)

    @property
    def samples_rollouts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(privilege.samples_rollouts for privilege in self.privileges)

    @property
    def needs_reflector(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(privilege.needs_reflector for privilege in self.privileges)

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for privilege in self.privileges:
            yield from privilege.drafts(group)


T = TypeVar("T")


def _rotated(members: Sequence[T], by: int) -> list[T]:
    by %= max(1, len(members))
    return [*members[by:], *members[:by]]
