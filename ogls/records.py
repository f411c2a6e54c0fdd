"""Records are the data that the parts of the framework hand to each other.

    problems -> rollouts -> groups -> lessons -> batch -> loss

Here is an example with one problem and G = 2 rollouts::

    problem = Problem(id="chain-7", text="What is 12+8-9?", answer="11",
                      solution="12+8=20\\n20-9=11\\n\\\\boxed{11}")
    right = Rollout(completion=Completion(token_ids=(33, 34, 2), logprobs=(-.1, -.2, 0.), finish_reason="stop"),
                    text="\\\\boxed{11}", verdict=Verdict(correct=True, status="graded", answer="11"))
    wrong = Rollout(...)
    group = RolloutGroup(problem=problem, prompt_ids=(5, 6), rollouts=(right, wrong), policy_version=3)

OGLS-SD makes one `Lesson` of the wrong rollout: its token ids, one weight per token, and three views, which are what
the teacher reads before those tokens: the plain prompt, the prompt with a right solution, the prompt with a wrong one.
A `Batch` is all lessons of one optimiser step. Records hold text and token ids; only the training step makes tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Span = tuple[int, int]
"""A span is a range [start, end) of characters or of tokens."""

Role = str
"""A role is the part that a view plays in the steering: ``plain``, or a name from the privilege such as ``success``."""

Lane = Literal["rollouts", "training"]
"""A lane is the half of a step that a phase belongs to: ``rollouts`` until the batch is made, then ``training``."""

Need = Literal[
    "rollouts",
    "peers",
    "answers",
    "solutions",
    "reflections",
    "error",
    "ideas",
    "advantages",
    "logprobs",
    "replies",
    "start",
    "demonstrations",
]
"""A need is what one choice of a method asks of the other choices or of the run.

``rollouts``: sampled text. ``peers``: at least two rollouts per problem. ``answers``: a
verifier that says which answer a text gives. ``solutions``: problems with a reference
solution, without which a problem teaches nothing. ``reflections``: a reflector. ``error``: the place where a wrong
rollout first goes wrong, from a reflector or an error locator. ``ideas``: an error locator that knows what to do
instead. ``advantages``: a value of each rollout relative to its group. ``logprobs``: sampling with the loss's own
probabilities, that is at the same temperature and without top_k or top_p. ``replies``: an engine that answers a
reflector. ``start``: the weights that training began with, for these replies. ``demonstrations``: an end of written
texts at which an engine stops.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A problem is a question with a verifiable answer.

    Args:
        id: name of the problem, which no other problem of the same source has
        text: the question
        answer: the gold answer
        solution: the reference solution s; None where there is none
        system: system message of this problem alone; None where it has none
        kind: name that picks the verifier, such as ``math`` or ``mcq``
        set: name of the evaluation set that it belongs to, where there are several; otherwise empty
    """

    id: str
    text: str
    answer: str
    solution: str | None = None
    system: str | None = None
    kind: str = "math"
    set: str = ""

    @property
    def name(self) -> str:
        """Returns the id, behind the name of its set where there are several, in which ids may be alike."""
        return f"{self.set}/{self.id}" if self.set else self.id


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A completion is what the engine sampled after a prompt.

    Args:
        token_ids: sampled ids, with the end token where it was sampled
        logprobs: log pi(token) of each id under the sampling distribution
        finish_reason: ``stop`` after the end token, ``length`` at the length limit
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A verdict is what a verifier says about a text.

    Args:
        correct: whether the answer is right
        status: ``graded``, or why there was nothing to grade
        answer: the answer found in the text; None where none was found
        feedback: what the author of the text may read about it, without the gold answer; two verdicts that differ in
            nothing else are equal
        error: what the verifier raised, where it crashed by an exception
    """

    correct: bool
    status: Literal["graded", "unparsable", "timeout", "crash"]
    answer: str | None = None
    feedback: str = field(default="", compare=False)
    error: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reflection:
    """A reflection is what a reflector says about a rollout.

    Args:
        idea: the idea that a wrong rollout lacks, or that makes a right one work
        quote: the passage where a wrong rollout first goes wrong; None for a right rollout
        span: characters [start, end) of the quote in the rollout's text; None where it is not found there
    """

    idea: str
    quote: str | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A rollout is a completion with its text and its verdict.

    Args:
        completion: what the engine sampled
        text: text of the sampled ids
        verdict: what the verifier said about the text
        reflection: what the reflector said about it; None where none was asked for or obtained
        unclosed: whether the text ends within a thought, that is before the ``</think>`` of a ``<think>``
    """

    completion: Completion
    text: str
    verdict: Verdict
    reflection: Reflection | None = None
    unclosed: bool = False

    @property
    def truncated(self) -> bool:
        """Returns whether the length limit cut the rollout off."""
        return self.completion.finish_reason == "length"

    @property
    def correct(self) -> bool:
        """Returns whether the rollout is right; one that is cut off is wrong by definition."""
        return self.verdict.correct and not self.truncated

    @property
    def feedback(self) -> str:
        """Returns the verdict's feedback; of a rollout that is cut off it says that alone."""
        return "It was cut off before its end: it is too long." if self.truncated else self.verdict.feedback


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """A group is G rollouts of one problem, sampled by the policy that had made `policy_version` updates."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]
    policy_version: int

    @property
    def successes(self) -> tuple[Rollout, ...]:
        """Returns the right rollouts in their order."""
        return tuple(r for r in self.rollouts if r.correct)

    @property
    def failures(self) -> tuple[Rollout, ...]:
        """Returns the wrong rollouts in their order."""
        return tuple(r for r in self.rollouts if not r.correct)

    @property
    def mixed(self) -> bool:
        """Returns whether the group has both right and wrong rollouts."""
        return 0 < len(self.successes) < len(self.rollouts)


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A view is a prompt that the teacher reads before the rollout's tokens, with its part in the steering."""

    role: Role
    prefix_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """A lesson is one sequence to learn from.

    Its tokens can be learned in three ways, and the objective uses some of them: distillation from a teacher that reads
    the `views`, likelihood where there are no views, and reinforcement by the rollout's `advantage`.

    Args:
        problem_id: id of the problem that the sequence answers
        prompt_ids: prompt that the student reads before the sequence
        token_ids: tokens of the sequence
        token_weights: one weight per token for distillation and likelihood; 0 leaves the token out
        logprobs: the sampler's log-probability of each token; None for text that was not sampled
        views: prompts that the teacher reads before the sequence, the plain one first; empty where nobody teaches
        advantage: one value for all tokens; 0 where the rollout is not reinforced

    Raises:
        ValueError: there is not exactly one weight per token.
    """

    problem_id: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    token_weights: tuple[float, ...]
    logprobs: tuple[float, ...] | None = None
    views: tuple[View, ...] = ()
    advantage: float = 0.0

    def __post_init__(self) -> None:
        if len(self.token_weights) != len(self.token_ids):
            raise ValueError(
                f"a lesson needs one weight per token: got {len(self.token_weights)} for {len(self.token_ids)}"
            )

    @property
    def num_weighted(self) -> int:
        """Returns the number of tokens that a teacher has to score: those up to the last one with a weight."""
        return max((t + 1 for t, w in enumerate(self.token_weights) if w), default=0)

    @property
    def num_learned(self) -> int:
        """Returns the number of tokens that the student has to score: those up to the last one that counts."""
        return len(self.token_ids) if self.advantage else self.num_weighted


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A phase is a stretch of time within one optimiser step. Phases of the same lane do not overlap.

    Args:
        lane: half of the step that the phase belongs to
        name: what is done, such as ``generate``
        step: number of the optimiser step, from 1
        start: beginning, in seconds since 1970
        end: end, in seconds since 1970
    """

    lane: Lane
    name: str
    step: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A batch is everything that one optimiser step learns from.

    Args:
        lessons: sequences to learn from
        policy_version: number of updates that the sampling weights had seen
        groups: rollout groups that the lessons come from
        metrics: counts (int) and rates that were measured while the batch was made
        phases: stretches of time in which it was made
    """

    lessons: tuple[Lesson, ...]
    policy_version: int
    groups: tuple[RolloutGroup, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling says how tokens are drawn.

        p = softmax(logits / temperature), cut to the `top_k` likeliest tokens and then to the probability mass `top_p`

    Args:
        max_tokens: largest number of tokens per completion, the end token included
        temperature: divisor of the logits; 0 takes the likeliest token
        top_p: probability mass of the likeliest tokens that are drawn from; 1 cuts nothing
        top_k: number of the likeliest tokens that are drawn from; 0 cuts nothing
        thinking_token_budget: number of tokens after ``<think>`` at which a thought that is still open is ended by
            ``</think>``, which the engine forces; null ends none. For evaluation alone.

    Raises:
        ValueError: a value is out of its range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    thinking_token_budget: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (self.temperature == 0 or 0.01 <= self.temperature <= 100):
            raise ValueError(f"temperature must be 0 or in [0.01, 100], got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        budget = self.thinking_token_budget
        if budget is not None and not 0 <= budget < self.max_tokens:
            raise ValueError(
                f"thinking_token_budget must be at least 0 and below max_tokens {self.max_tokens}, which has to hold "
                f"the answer, too; got {budget}"
            )

    def is_softmax_at(self, temperature: float) -> bool:
        """Returns whether the log-probabilities of drawn tokens are log softmax(logits / temperature)."""
        drawn = (self.temperature, self.top_p, self.top_k, self.thinking_token_budget)
        return drawn == (temperature, 1.0, 0, None)
