"""Demonstrations for the cold start: what the embedded model is taught before it can teach itself."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ogls.lessons.privilege import LessonDraft, Privilege, PrivilegedText, ReflectionTask
from ogls.records import RolloutGroup
from ogls.system.seeds import derive
from ogls.tasks.chains import PARENTHESES_FIRST, Chain, first_mistake


@dataclass(frozen=True)
class WorkedAttempts(Privilege):
    """Likelihood on worked chains, from four prompts: the plain one, and three that give something to read.

    Own work has slips, and ignores parentheses now and then. An attempt to read is right or wrong with equal odds, and
    mostly followed. An idea is followed without an error. Asked to reflect, it quotes the first error and has an idea.

    Args:
        slip: probability that a step of one's own work is wrong.
        wrong_idea: probability that parentheses are ignored in one's own work.
        with_attempt, with_idea, reflecting: shares of demonstrations that read an attempt, that read an idea, that
            reflect on an attempt. The rest is plain.
        own_way: share of those with an attempt that do not follow it and work on their own.
    """

    slip: float = 0.08
    wrong_idea: float = 0.4
    with_attempt: float = 0.3
    with_idea: float = 0.15
    reflecting: float = 0.15
    own_way: float = 0.1
    samples_rollouts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("with_attempt", "with_idea", "reflecting")}
        if min(shares.values()) < 0 or sum(shares.values()) > 1:
            raise ValueError(f"the shares of what is read must not exceed 1 together, got {shares}")

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        problem = group.problem
        rng = random.Random(derive("attempt", problem.id, group.policy_version))
        chain = Chain.parse(problem.text)
        own = chain.work(rng, self.slip, rng.random() < self.wrong_idea)
        kind = rng.random()
        if kind < self.with_attempt:
            read = chain.work() if rng.random() < 0.5 else chain.wrong_work(rng)
            followed = own if rng.random() < self.own_way else read
            yield LessonDraft(demonstration=followed, prompt=PrivilegedText(role="success", text=read))
        elif kind < self.with_attempt + self.with_idea:
            idea = PARENTHESES_FIRST if chain.inner is not None else "Calculate with care."
            mistake = first_mistake(problem, chain.wrong_work(rng))
            if mistake is not None and rng.random() < 0.5:
                idea = mistake.idea
            yield LessonDraft(demonstration=chain.work(), prompt=PrivilegedText(role="idea", text=idea))
        elif kind < self.with_attempt + self.with_idea + self.reflecting:
            yield self._reflection(group, chain, rng)
        else:
            yield LessonDraft(demonstration=own)

    def _reflection(self, group: RolloutGroup, chain: Chain, rng: random.Random) -> LessonDraft:
        attempt = chain.wrong_work(rng, self.slip)
        mistake = first_mistake(group.problem, attempt)
        if rng.random() < 0.25 or mistake is None:
            return LessonDraft(
                demonstration=json.dumps({"idea": chain.idea}),
                prompt=ReflectionTask(attempt=chain.work(), correct=True),
            )
        return LessonDraft(
            demonstration=json.dumps({"quote": mistake.quote, "idea": mistake.idea}),
            prompt=ReflectionTask(attempt=attempt, correct=False, solution=chain.work()),
        )
