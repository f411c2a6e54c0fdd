"""Students are shown chains of arithmetic before they can teach themselves.

The chains come from every prompt of the framework. `Demonstrations` make the micro student of the lab,
`WorkedAttempts` the cold start of the embedded model.

Three habits are planted, so that the lab shows what methods do about them:

- its own work has slips, and it ignores parentheses now and then: room to improve;
- it mostly follows the attempt that it reads, right or wrong: a teacher;
- having read an attempt, it likes to state the answer at once. Where there is none to read, such an answer is a guess
  and nearly always wrong: a style of the privileged view that the student cannot perform.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from ogls.lessons.privilege import LessonDraft, Privilege, PrivilegedText, ReflectionTask
from ogls.lessons.prompts import ATTEMPT, IDEA, PromptEncoder, Wording
from ogls.records import Need, Problem, Role, RolloutGroup
from ogls.system.seeds import derive
from ogls.tasks.base import MistakeLocator, num_alike
from ogls.tasks.chains import PARENTHESES_FIRST, Chain, ChainErrors

CHAINS = {"min_steps": 2, "max_steps": 3, "parentheses": 0.7}
IDEAS = ("Calculate with care.", "Calculate from left to right.", "Copy the numbers with care.")
IDEAS += ("The answer is the last result.", PARENTHESES_FIRST)
PHRASES = ("What is ", "\\boxed{", "Calculate ", " again.", '{"quote": "', '", "idea": "', '{"idea": "', '"}', *IDEAS)

PROBLEMS = [{"size": 13_000, "seed": 100 + part, **CHAINS} for part in range(3)]
"""Of pre-training; one source holds no more."""

Example = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt ids, completion ids."""


class Work(Protocol):
    """Work is a problem that can be worked on as the habits want: with slips, and by the wrong idea."""

    @property
    def idea(self) -> str: ...

    def work(self, rng: random.Random | None = None, slip: float = 0.0, wrong_idea: bool = False, /) -> str: ...

    def wrong_work(self, rng: random.Random, slip: float = ..., /) -> str: ...


@dataclass(frozen=True)
class Habits:
    """Habits are what is planted: rates in the student's own work, and shares of what is read before working.

    Args:
        slip: probability that a step of one's own work is wrong
        wrong_idea: probability that one's own work ignores parentheses
        guesses: share of plain answers without work
        with_attempt: share of demonstrations with an attempt in view; it is right or wrong with equal odds
        with_idea: share of demonstrations with an idea in view, which is followed without an error
        reflecting: share of demonstrations that reflect on an attempt; the rest has the plain prompt
        terse_attempts: share of attempts in view that are an answer without work
        own_way: probability that the attempt in view is not followed
        terse_after_worked: probability that the answer of a worked attempt in view is stated at once
        terse_after_terse: probability that the answer of a terse attempt in view is stated at once
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
    mistakes: ClassVar[MistakeLocator] = ChainErrors()

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("with_attempt", "with_idea", "reflecting")}
        if min(shares.values()) < 0 or sum(shares.values()) > 1:
            raise ValueError(f"the shares of what is read must not exceed 1 together, got {shares}")

    def demonstrate(self, problem: Problem, rng: random.Random) -> LessonDraft:
        """Returns a text that the student is shown for a problem, with the prompt that it follows."""
        work, kind = self.read(problem), rng.random()
        if kind < self.with_attempt:
            attempt, text = self._after_attempt(work, rng)
            return LessonDraft(demonstration=text, prompt=PrivilegedText(role="success", text=attempt))
        if kind < self.with_attempt + self.with_idea:
            idea, text = self.after_idea(problem, rng)
            return LessonDraft(demonstration=text, prompt=PrivilegedText(role="idea", text=idea))
        if kind < self.with_attempt + self.with_idea + self.reflecting:
            task, text = self._reflection(problem, work, rng)
            return LessonDraft(demonstration=text, prompt=task)
        is_guess = rng.random() < self.guesses
        return LessonDraft(demonstration=self.guess(problem, rng) if is_guess else self.own(work, rng))

    def read(self, problem: Problem) -> Work:
        """Returns the problem as something to work on."""
        return Chain.parse(problem.text)

    def guess(self, problem: Problem, rng: random.Random) -> str:
        """Returns an answer without work: of the right size, right one time in twenty-one."""
        return f"\\boxed{{{max(0, int(problem.answer) + rng.randint(-10, 10))}}}"

    def after_idea(self, problem: Problem, rng: random.Random) -> tuple[str, str]:
        """Returns an idea, and what is written with it in view."""
        work = self.read(problem)
        mistake = self.mistakes.mistake(problem, work.wrong_work(rng))
        return mistake.idea if mistake is not None and rng.random() < 0.5 else work.idea, work.work()

    def own(self, work: Work, rng: random.Random) -> str:
        """Returns what is written with nothing in view."""
        return work.work(rng, self.slip, rng.random() < self.wrong_idea)

    def _after_attempt(self, work: Work, rng: random.Random) -> tuple[str, str]:
        worked = work.work() if rng.random() < 0.5 else work.wrong_work(rng)
        is_terse = rng.random() < self.terse_attempts
        attempt = terse(worked) if is_terse else worked
        if rng.random() < (self.terse_after_terse if is_terse else self.terse_after_worked):
            return attempt, terse(worked)
        # An answer alone cannot be followed in work, except that it tells right from wrong.
        return attempt, self.own(work, rng) if rng.random() < self.own_way else worked

    def _reflection(self, problem: Problem, work: Work, rng: random.Random) -> tuple[ReflectionTask, str]:
        """Returns what a reflector is asked about an attempt, and its answer: quote of the error and idea, as JSON."""
        attempt = work.wrong_work(rng, max(self.slip, 0.1))
        mistake = self.mistakes.mistake(problem, attempt)
        if rng.random() < 0.25 or mistake is None:
            return ReflectionTask(attempt=work.work(), correct=True), json.dumps({"idea": work.idea})
        task = ReflectionTask(attempt=attempt, correct=False, solution=work.work())
        return task, json.dumps({"quote": mistake.quote, "idea": mistake.idea})


@dataclass(frozen=True)
class NothingPlanted(Habits):
    """These habits plant no error and no style: right work alone, and an attempt in view is mostly followed."""

    slip: float = 0.0
    wrong_idea: float = 0.0
    guesses: float = 0.0
    with_attempt: float = 0.3
    with_idea: float = 0.15
    terse_attempts: float = 0.0
    own_way: float = 0.1
    terse_after_worked: float = 0.0


class Demonstrations:
    """Demonstrations are endless examples for `problems`; the n-th is a function of the seed and of those before it.

    Args:
        encoder: prompts as tokens
        habits: what is planted
        seed: seed of all draws
        problems: chains to draw from
        thinking: prompts of the demonstrations that begin with a thought; None has `encoder` for them
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        habits: Habits,
        seed: int,
        problems: Sequence[Problem],
        thinking: PromptEncoder | None = None,
    ) -> None:
        self.encoder, self.habits, self.rng, self.problems = encoder, habits, random.Random(seed), problems
        self.thinking = thinking or encoder

    def batches(self, size: int, lots: int = 16) -> Iterator[list[Example]]:
        """Yields batches of examples of about the same length: `lots` of them are drawn at once and sorted."""
        while True:
            drawn = sorted((self.draw() for _ in range(size * lots)), key=lambda example: len(example[0] + example[1]))
            batches = [drawn[i : i + size] for i in range(0, len(drawn), size)]
            yield from self.rng.sample(batches, len(batches))

    def draw(self) -> Example:
        """Returns the next example."""
        problem = self.problems[self.rng.randrange(len(self.problems))]
        draft = self.habits.demonstrate(problem, self.rng)
        assert draft.demonstration is not None
        encoder = self.thinking if draft.demonstration.startswith("<think>") else self.encoder
        match draft.prompt:
            case PrivilegedText(role=role, text=text):
                prompt = encoder.view(problem, WorkedAttempts.views[role], text)
            case ReflectionTask() as task:
                prompt = encoder.reflect(problem, task.attempt, task.correct, task.solution)
            case None:
                prompt = encoder.student(problem)
        return prompt, encoder.completion(draft.demonstration)


def terse(work: str) -> str:
    """Returns the answer without the work."""
    return work.splitlines()[-1]


@dataclass(frozen=True)
class WorkedAttempts(Privilege):
    """WorkedAttempts shows one demonstration per problem, for a cold start by likelihood.

    Args:
        habits: what is planted; by default nothing terse, so that an attempt in view is mostly followed as it is worked
    """

    habits: Habits = Habits(
        guesses=0.0,
        with_attempt=0.3,
        with_idea=0.15,
        terse_attempts=0.0,
        own_way=0.1,
        terse_after_worked=0.0,
    )
    views: ClassVar[Mapping[Role, Wording]] = {"success": ATTEMPT, "idea": IDEA}
    needs: ClassVar[frozenset[Need]] = frozenset({"demonstrations"})

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        rng = random.Random(derive("attempt", group.problem.id, group.policy_version))
        yield self.habits.demonstrate(group.problem, rng)


def first_difference(got: str, right: str) -> tuple[int, int]:
    """Returns the characters of `got` from the first that differs to the end of its number or word."""
    same = num_alike(got, right)
    word = re.compile(r"\w*").match(got, same)
    return same, max(word.end() if word else same, same + 1)
