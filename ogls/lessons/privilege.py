"""A privilege says which rollouts are learned from, and what the teacher reads.

A privilege turns a group of rollouts into drafts of lessons. Drafts hold text only; `ogls.lessons.build` turns them
into token ids and weights.
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
from ogls.system.ranges import check


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivilegedText:
    """A privileged text is read by the teacher alone.

    Args:
        role: part that the view plays in the steering
        text: attempt, solution or idea in the view; None where the feedback is all that is shown
        feedback: what the verifier said of the rollout that is learned; an empty one is not shown
    """

    role: Role
    text: str | None
    feedback: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflectionTask:
    """A reflection task asks where a wrong attempt goes wrong, or why a right one is right.

    Args:
        attempt: text of the attempt
        correct: whether the attempt's answer is right
        solution: text of a right solution to compare a wrong attempt with
    """

    attempt: str
    correct: bool
    solution: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LessonDraft:
    """A draft is a lesson that has no token ids yet.

    Args:
        rollout: sampled rollout to learn from; exactly one of `rollout` and `demonstration` is given
        demonstration: written text to learn from
        texts: texts that the teacher reads, one view per text, in addition to the plain view
        plain: whether the teacher reads the plain view where there are no texts
        prompt: what the student itself reads instead of the plain problem (cold start only)
        selection: choice of the tokens that count; None takes the method's
        weight: factor of all token weights of this lesson
    """

    rollout: Rollout | None = None
    demonstration: str | None = None
    texts: tuple[PrivilegedText, ...] = ()
    plain: bool = False
    prompt: PrivilegedText | ReflectionTask | None = None
    selection: TokenSelection | None = None
    weight: float = 1.0


class Privilege(ABC):
    """A privilege says which rollouts of a group are learned from, and what the teacher reads about each.

    A group from which nothing can be learned gives no draft, so that no mean over an empty set is ever taken.
    """

    views: ClassVar[Mapping[Role, Wording]] = {}
    """The roles of the texts that the teacher reads, each with the words around it. A draft has all roles or none."""
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts"})
    plain: ClassVar[bool] = False
    """Whether the teacher reads the problem alone, so that there are no texts."""
    selects: ClassVar[bool] = False
    """Whether some drafts have a selection of their own, instead of the method's."""

    @abstractmethod
    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        """Yields one draft for every sequence that is learned from this group."""


@dataclass(frozen=True)
class Demonstration(Privilege):
    """The reference solution is learned by its likelihood (SFT); nothing is sampled."""

    needs: ClassVar[frozenset[Need]] = frozenset({"demonstrations", "solutions"})

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        if group.problem.solution is not None:
            yield LessonDraft(demonstration=group.problem.solution)


@dataclass(frozen=True)
class ReferenceSolution(Privilege):
    """The teacher reads the reference solution (OPSD, arXiv 2601.18734). A problem without one gives nothing.

    Args:
        rollouts: rollouts to learn from: ``all``, as published, or only the ``wrong`` ones
    """

    rollouts: Literal["all", "wrong"] = "all"
    views: ClassVar[Mapping[Role, Wording]] = {"success": ATTEMPT}
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts", "solutions"})

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        if group.problem.solution is None:
            return
        texts = (PrivilegedText(role="success", text=group.problem.solution),)
        for rollout in group.rollouts if self.rollouts == "all" else group.failures:
            yield LessonDraft(rollout=rollout, texts=texts)


@dataclass(frozen=True)
class Unprivileged(Privilege):
    """The teacher reads no privileged text; rollouts are learned by their advantages alone (GRPO)."""

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        return iter(())


@dataclass(frozen=True)
class ProblemAlone(Privilege):
    """The teacher reads the problem alone, as the student does; what it knows more is in its weights.

    This is for a teacher that is another model, or an average of the student's weights.

    Args:
        rollouts: rollouts to learn from: ``all``, or only the ``wrong`` ones
    """

    rollouts: Literal["all", "wrong"] = "all"
    plain: ClassVar[bool] = True

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for rollout in group.rollouts if self.rollouts == "all" else group.failures:
            yield LessonDraft(rollout=rollout, plain=True)


@dataclass(frozen=True)
class SuccessfulPeer(Privilege):
    """The teacher reads a right peer of the rollout (SDPO, arXiv 2601.20802).

    This is SDPO for environments that say no more than right or wrong; `Feedback` adds what they say. A peer is another
    rollout of the same group, never the rollout itself, though its text may be the same. Right rollouts take turns as
    peers. A rollout without a right peer gives nothing.

    Args:
        rollouts: rollouts to learn from: ``all``, as published, or only the ``wrong`` ones
        solution_as_peer: whether the reference solution stands in where a rollout has no right peer
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
    """The last tokens of short right rollouts are learned by likelihood (OGLS-SD v2, arXiv 2605.12400).

    This keeps rollouts from growing longer. Short means shorter than the median of the group; the paper gives neither
    this threshold nor a weight. The privilege belongs beside another one, in `Several`, with an objective that has a
    `Likelihood` in its mixture.

    Args:
        count: number of tokens at the end of a rollout that are learned
    """

    count: int = 128
    needs: ClassVar[frozenset[Need]] = frozenset({"rollouts", "peers"})
    selects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self, {"count": "[1, 1e9]"})

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        middle = median(len(rollout.completion.token_ids) for rollout in group.rollouts)
        for rollout in group.successes:
            if len(rollout.completion.token_ids) < middle:
                yield LessonDraft(rollout=rollout, selection=LastTokens(self.count))


@dataclass(frozen=True)
class PeerOutcomes(Privilege):
    """The teacher reads right and wrong attempts for every wrong rollout (OGLS-SD, arXiv 2605.12400, algorithm 1).

        P+ = {reference solution, if there is one} + {right rollouts}        P- = {wrong rollouts}

    A group gives nothing if all its rollouts are right or one of its pools is empty. A group whose rollouts are all
    wrong still gives lessons if there is a reference solution.

    Args:
        max_peers: largest number of views per pool; null takes all, as published. A limited pool is rotated to begin at
            the rollout's own place in it, so that all members are used evenly.
        exclude_self: whether a rollout is left out of its own pool; the paper has it in
        use_solution: whether the reference solution is in the pool of right attempts
        truncated_failures: whether rollouts that the length limit cut off are in the pool of wrong attempts
        learn_successes: whether right rollouts of groups with a wrong one are learned from, too; the paper learns from
            wrong ones only
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
        """Returns up to `max_peers` texts of the pool, from the rollout's own place on, or from `index` without one."""
        start = next((i for i, member in enumerate(pool) if member is own), index)
        # When the rollout is left out, the member after it takes its place.
        members = [m for m in pool if not (self.exclude_self and m is own)]
        texts = [member if isinstance(member, str) else member.text for member in _rotated(members, start)]
        return texts[: self.max_peers]


@dataclass(frozen=True)
class Several(Privilege):
    """Several privileges stand side by side, and a group gives the drafts of all of them.

    Args:
        privileges: list of privileges; those with views have the same roles, since one steering serves them all

    Raises:
        ValueError: the list is empty, or the roles differ.
    """

    privileges: list[Privilege]

    def __post_init__(self) -> None:
        object.__setattr__(self, "privileges", list(self.privileges))  # a list of its own
        if not self.privileges:
            raise ValueError("Several needs at least one privilege, got none")
        taught = [privilege for privilege in self.privileges if privilege.views or privilege.plain]
        different = sorted({tuple(sorted(privilege.views)) for privilege in taught})
        if len(different) > 1:
            raise ValueError(f"Several needs privileges with views of the same roles, got {different}")

    @property
    def views(self) -> Mapping[Role, Wording]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {role: wording for privilege in self.privileges for role, wording in privilege.views.items()}

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset().union(*(privilege.needs for privilege in self.privileges))

    @property
    def plain(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(privilege.plain for privilege in self.privileges)

    @property
    def selects(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(privilege.selects for privilege in self.privileges)

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for privilege in self.privileges:
            yield from privilege.drafts(group)


T = TypeVar("T")


def _rotated(members: Sequence[T], by: int) -> list[T]:
    by %= max(1, len(members))
    return [*members[by:], *members[:by]]
