"""What the teacher reads: from groups of rollouts to drafts of lessons.

A privilege decides which rollouts are learned from and which views the teacher takes of each. Here are strings only;
`ogls.lessons` turns a draft into token ids and weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ogls.records import Role, Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Hint:
    """A privileged text and the part it plays."""

    role: Role
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a reflector is asked: where does this wrong attempt go wrong, or why is this right one right?"""

    attempt: str
    correct: bool
    solution: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A lesson before it has token ids.

    Exactly one of `rollout` (sampled) and `demonstration` (written) is what is learned. `hints` are the teacher's
    privileged views beside the plain one. `prompt` is what the student itself reads instead of the plain problem (cold
    start only).
    """

    rollout: Rollout | None = None
    demonstration: str | None = None
    hints: tuple[Hint, ...] = ()
    prompt: Hint | Task | None = None


class Privilege(ABC):
    """Groups in, drafts out. A group without a signal gives no draft, so nothing is ever averaged over nothing."""

    samples_rollouts: ClassVar[bool] = True
    roles: ClassVar[frozenset[Role]] = frozenset()
    """Roles of the views that every draft has beside the plain one."""
    min_group_size: ClassVar[int] = 1

    @abstractmethod
    def drafts(self, group: RolloutGroup) -> Iterator[Draft]:
        """What to learn from this group."""


@dataclass(frozen=True)
class Demonstration(Privilege):
    """SFT: likelihood of the reference solution; nothing is sampled."""

    samples_rollouts: ClassVar[bool] = False

    def drafts(self, group: RolloutGroup) -> Iterator[Draft]:
        if group.problem.solution is not None:
            yield Draft(demonstration=group.problem.solution)


@dataclass(frozen=True)
class ReferenceSolution(Privilege):
    """OPSD (arXiv 2601.18734): the teacher reads the reference solution s.

    Args:
        rollouts: ``all`` as published, or only the ``wrong`` ones.
    """

    rollouts: Literal["all", "wrong"] = "all"
    roles: ClassVar[frozenset[Role]] = frozenset({"success"})

    def drafts(self, group: RolloutGroup) -> Iterator[Draft]:
        if group.problem.solution is None:
            return
        hints = (Hint(role="success", text=group.problem.solution),)
        for rollout in group.rollouts if self.rollouts == "all" else group.failures:
            yield Draft(rollout=rollout, hints=hints)


@dataclass(frozen=True)
class PeerOutcomes(Privilege):
    """OGLS-SD (arXiv 2605.12400, algorithm 1): success pool P+ and failure pool P- for every wrong rollout.

        P+ = {reference solution, if there is one} + {right rollouts}        P- = {wrong rollouts}

    All-right groups and groups with an empty pool give nothing; an all-wrong group still trains when s exists.

    Args:
        max_peers: views a pool at most; null takes all, as published. A limited pool is rotated: the rollout's own
            place in it comes first, so that all members are used evenly.
        exclude_self: leave the rollout itself out of its own P- (published: it is in).
        use_solution: put the reference solution into P+.
        truncated_failures: keep unfinished rollouts in P-.
    """

    max_peers: int | None = None
    exclude_self: bool = False
    use_solution: bool = True
    truncated_failures: bool = True
    roles: ClassVar[frozenset[Role]] = frozenset({"success", "failure"})
    min_group_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.max_peers is not None and self.max_peers < 1:
            raise ValueError(f"max_peers must be at least 1, got {self.max_peers}")

    def drafts(self, group: RolloutGroup) -> Iterator[Draft]:
        success = [group.problem.solution] if self.use_solution and group.problem.solution is not None else []
        success += [rollout.text for rollout in group.successes]
        failures = [r for r in group.failures if self.truncated_failures or not r.truncated]
        for index, rollout in enumerate(group.failures):
            peers = [r.text for r in failures if not (self.exclude_self and r is rollout)]
            # Its own place comes first; without itself, the next one is at the same index.
            own = next((i for i, r in enumerate(failures) if r is rollout), index)
            right, wrong = self._rotate(success, index), self._rotate(peers, own)
            if right and wrong:
                hints = [Hint(role="success", text=t) for t in right] + [Hint(role="failure", text=t) for t in wrong]
                yield Draft(rollout=rollout, hints=tuple(hints))

    def _rotate(self, pool: Sequence[str], by: int) -> list[str]:
        if not pool:
            return []
        by %= len(pool)
        return [*pool[by:], *pool[:by]][: self.max_peers]
