"""The records that travel along the arrows of the framework.

    problems -> rollouts -> groups -> lessons -> batch -> loss

A worked example with one problem and G = 2::

    problem = Problem(id="chain-7", text="What is 12+8-9?", answer="11",
                      solution="12+8=20\\n20-9=11\\n\\\\boxed{11}")
    right = Rollout(completion=Completion(token_ids=(33, 34, 2), logprobs=(-.1, -.2, 0.), finish_reason="stop"),
                    text="\\\\boxed{11}", verdict=Verdict(correct=True, status="graded", answer="11"))
    wrong = Rollout(...)
    group = RolloutGroup(problem=problem, prompt_ids=(5, 6), rollouts=(right, wrong), policy_version=3)

OGLS-SD makes one `Lesson` of the wrong rollout: its token ids, one weight per token, and three views, which are what
the teacher reads before those tokens: the plain prompt, the prompt with a right solution, the prompt with a wrong one.
A `Batch` is all lessons of one optimiser step. Records hold text and token ids; tensors begin behind the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Span = tuple[int, int]
"""Start and end, the end not included: of characters or of tokens."""

Role = str
"""The part that a view plays in the steering: ``plain``, or a name that a privilege gives, such as ``success``."""

Lane = Literal["rollouts", "training"]
"""The half of a step that a phase belongs to: text becomes ``rollouts``, tensors are ``training``."""

Need = Literal["rollouts", "peers", "reflections", "error", "advantages", "logprobs", "replies", "start"]
"""What one choice of a method asks of the others or of the run.

``rollouts``: sampled text. ``peers``: at least two rollouts per problem. ``reflections``: a reflector. ``error``: a
place where a wrong rollout first goes wrong, by a reflector or an error locator. ``advantages``: a value of each
rollout against its group. ``logprobs``: the sampler's probabilities are those of the loss (same temperature, nothing
cut off). ``replies``: an engine that answers a reflector, ``start``: with the weights that training began with.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A question with a verifiable answer. `kind` picks the verifier; `solution` is the reference s, if any."""

    id: str
    text: str
    answer: str
    solution: str | None = None
    system: str | None = None
    kind: str = "math"


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the engine sampled: ids including the end token, and log pi(token) under the sampling distribution."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A verifier's judgement. `answer` is what was extracted; None where nothing could be."""

    correct: bool
    status: Literal["graded", "unparsable", "timeout", "crash"]
    answer: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reflection:
    """What a reflector says of a rollout: the idea that a wrong one lacks, or that carries a right one.

    `quote` is where a wrong rollout first goes wrong, and `span` its characters [start, end) in the rollout's text;
    None where it could not be found there, and of a right rollout.
    """

    idea: str
    quote: str | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A completion, its text, and its verdict. A rollout cut by the length limit is wrong by definition."""

    completion: Completion
    text: str
    verdict: Verdict
    reflection: Reflection | None = None

    @property
    def truncated(self) -> bool:
        return self.completion.finish_reason == "length"

    @property
    def correct(self) -> bool:
        return self.verdict.correct and not self.truncated


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """G rollouts of one problem, sampled by the policy that had made `policy_version` updates."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]
    policy_version: int

    @property
    def successes(self) -> tuple[Rollout, ...]:
        return tuple(r for r in self.rollouts if r.correct)

    @property
    def failures(self) -> tuple[Rollout, ...]:
        return tuple(r for r in self.rollouts if not r.correct)

    @property
    def mixed(self) -> bool:
        return 0 < len(self.successes) < len(self.rollouts)


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What the teacher reads before the rollout's tokens, and the part it plays in the steering."""

    role: Role
    prefix_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """A lesson is one sequence to learn from.

    Its tokens can be learned in three ways, of which the objective uses some: towards what a teacher says who has read
    the `views`, by their likelihood where there are no views, and by the rollout's `advantage` in its group.

    Args:
        problem_id: the problem that the sequence answers
        prompt_ids: what the student reads before it
        token_ids: the sequence itself
        token_weights: one number per token for the first two ways; 0 leaves the token out
        logprobs: the sampler's log-probabilities of the tokens; None for text that was not sampled
        views: what the teacher reads instead of the prompt, the plain prompt first; empty where nobody teaches
        advantage: one number for all tokens; 0 where the rollout is not reinforced
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
        """Tokens up to and including the last one with a weight: all that a teacher has to score."""
        return max((t + 1 for t, w in enumerate(self.token_weights) if w), default=0)

    @property
    def num_learned(self) -> int:
        """Tokens up to and including the last one that counts in any way: all that the student has to score."""
        return len(self.token_ids) if self.advantage else self.num_weighted


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A phase is a stretch of time within optimiser step `step` (1 is the first), in seconds since the epoch.

    Phases of one lane do not overlap.
    """

    lane: Lane
    name: str
    step: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Everything one optimiser step learns from, and what was measured while it was made: counts (int) and rates."""

    lessons: tuple[Lesson, ...]
    policy_version: int
    groups: tuple[RolloutGroup, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn: softmax(logits / temperature), cut to the `top_k` likeliest and then to the mass `top_p`.

    `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 cut nothing. `max_tokens` counts the end token.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")

    def is_softmax_at(self, temperature: float) -> bool:
        """Whether log-probs of what is drawn are log softmax(logits / temperature)."""
        return (self.temperature, self.top_p, self.top_k) == (temperature, 1.0, 0)
