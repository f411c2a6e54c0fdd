"""What students are shown before they can teach themselves: chains of arithmetic from every prompt of the framework.

`Demonstrations` make the micro student of the lab, `WorkedAttempts` the cold start of the embedded model.

Three habits are planted, so that the lab shows what methods do about them:

- its own work has slips, and it ignores parentheses now and then: room to improve;
- it mostly follows the attempt that it reads, right or wrong: a teacher;
- having read an attempt, it likes to state the answer at once. Where there is none to read, such an answer is a guess
  and nearly always wrong: a style of the privileged view that the student cannot perform.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ogls.lessons.privilege import LessonDraft, Privilege, PrivilegedText, ReflectionTask
from ogls.lessons.prompts import ATTEMPT, IDEA, PromptEncoder, Wording
from ogls.records import Need, Problem, Role, RolloutGroup
from ogls.system.seeds import derive
from ogls.tasks.chains import PARENTHESES_FIRST, Chain, first_mistake

CHAINS = {"min_steps": 2, "max_steps": 3, "parentheses": 0.7}
IDEAS = ("Calculate with care.", "Calculate from left to right.", "Copy the numbers with care.")
IDEAS += ("The answer is the last result.", PARENTHESES_FIRST)
PHRASES = ("What is ", "\\boxed{", "Calculate ", " again.", '{"quote": "', '", "idea": "', '{"idea": "', '"}', *IDEAS)

PROBLEMS = [{"size": 13_000, "seed": 100 + part, **CHAINS} for part in range(3)]
"""Of pre-training; one source holds no more."""

Example = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt ids, completion ids."""


@dataclass(frozen=True)
class Habits:
    """What the student is shown. Rates of its own work, and shares of demonstrations; the rest is the plain prompt.

    Args:
        slip: a step of its own work is wrong.
        wrong_idea: its own work ignores parentheses.
        guesses: plain answers without work.
        with_attempt, with_idea, reflecting: shares of demonstrations with an attempt in view, with an idea, and of
            reflections on an attempt.
        terse_attempts: attempts in view that are an answer without work.
        own_way: the attempt in view is not followed.
        terse_after_worked, terse_after_terse: the answer of the attempt is stated at once.
    """

    slip: float = 0.08
    wrong_idea: float = 0.4
    guesses: float = 0.08
    with_attempt: float = 0.35
    with_idea: float = 0.1
    reflecting: float = 0.15
    terse_attempts: float = 0.4
    own_way: float = 0.08
    terse_after_worked: float = 0.3
    terse_after_terse: float = 0.8


class Demonstrations:
    """Endless demonstrations on the chains of `problems`; the n-th is a function of the seed and of those before it."""

    def __init__(self, encoder: PromptEncoder, habits: Habits, seed: int, problems: Sequence[Problem]) -> None:
        self.encoder, self.habits, self.rng, self.problems = encoder, habits, random.Random(seed), problems

    def batches(self, size: int, lots: int = 16) -> Iterator[list[Example]]:
        """Batches of examples of about the same length: `lots` of them are drawn at once and sorted."""
        while True:
            drawn = sorted((self.draw() for _ in range(size * lots)), key=lambda example: len(example[0] + example[1]))
            batches = [drawn[i : i + size] for i in range(0, len(drawn), size)]
            yield from self.rng.sample(batches, len(batches))

    def draw(self) -> Example:
        habits, rng, encoder = self.habits, self.rng, self.encoder
        problem = self.problems[rng.randrange(len(self.problems))]
        chain, kind = Chain.parse(problem.text), rng.random()
        if kind < habits.with_attempt:
            prompt, text = self._after_attempt(problem, chain)
        elif kind < habits.with_attempt + habits.with_idea:
            prompt, text = encoder.view(problem, IDEA, self._idea(problem, chain)), chain.work()
        elif kind < habits.with_attempt + habits.with_idea + habits.reflecting:
            task, text = reflection(problem, chain, rng, max(habits.slip, 0.1))
            prompt = encoder.reflect(problem, task.attempt, task.correct, task.solution)
        else:
            text = f"\\boxed{{{guess(chain, rng)}}}" if rng.random() < habits.guesses else self._own(chain)
            prompt = encoder.student(problem)
        return prompt, encoder.completion(text)

    def _own(self, chain: Chain) -> str:
        return chain.work(self.rng, self.habits.slip, self.rng.random() < self.habits.wrong_idea)

    def _after_attempt(self, problem: Problem, chain: Chain) -> tuple[tuple[int, ...], str]:
        habits, rng = self.habits, self.rng
        worked = chain.work() if rng.random() < 0.5 else chain.wrong_work(rng)
        is_terse = rng.random() < habits.terse_attempts
        attempt = terse(worked) if is_terse else worked
        prompt = self.encoder.view(problem, ATTEMPT, attempt)
        if rng.random() < (habits.terse_after_terse if is_terse else habits.terse_after_worked):
            return prompt, terse(worked)
        # An answer alone cannot be followed in work, except that it tells right from wrong.
        return prompt, self._own(chain) if rng.random() < habits.own_way else worked

    def _idea(self, problem: Problem, chain: Chain) -> str:
        mistake = first_mistake(problem, chain.wrong_work(self.rng))
        if mistake is not None and self.rng.random() < 0.5:
            return mistake.idea
        return chain.idea


def reflection(problem: Problem, chain: Chain, rng: random.Random, slip: float) -> tuple[ReflectionTask, str]:
    """What a reflector is asked about an attempt, and its answer: a quote of the first error and an idea, as JSON."""
    attempt = chain.wrong_work(rng, slip)
    mistake = first_mistake(problem, attempt)
    if rng.random() < 0.25 or mistake is None:
        return ReflectionTask(attempt=chain.work(), correct=True), json.dumps({"idea": chain.idea})
    task = ReflectionTask(attempt=attempt, correct=False, solution=chain.work())
    return task, json.dumps({"quote": mistake.quote, "idea": mistake.idea})


def terse(work: str) -> str:
    """The answer without the work."""
    return work.splitlines()[-1]


def guess(chain: Chain, rng: random.Random) -> int:
    """An answer without work: of the right size, right one time in twenty-one."""
    return max(0, chain.answer + rng.randint(-10, 10))


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
    views: ClassVar[Mapping[Role, Wording]] = {"success": ATTEMPT, "idea": IDEA}
    needs: ClassVar[frozenset[Need]] = frozenset({"demonstrations"})

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
            task, text = reflection(problem, chain, rng, self.slip)
            yield LessonDraft(demonstration=text, prompt=task)
        else:
            yield LessonDraft(demonstration=own)
