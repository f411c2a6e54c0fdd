"""The sampler gives graded rollouts, by an engine and a pool of verifiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy

from ogls.lessons.prompts import PromptEncoder
from ogls.policy.policy import Policy
from ogls.records import Completion, Problem, Rollout, RolloutGroup, Sampling
from ogls.rollout.engine import RolloutEngine
from ogls.rollout.guard import EngineGuard
from ogls.system.step_metrics import timed
from ogls.tasks.grading import GradingPool


class Sampler:
    """A sampler gives graded rollouts from the weights that the policy had at the last call of `hold`.

    `version` is the version of these weights, also while `at_start` has the engine hold those of version 0. The engine
    starts when the sampler is made.

    Args:
        engine: engine that samples
        policy: student, whose folder the engine reads and whose weights it takes
        encoder: translation of sampled ids to text
        pool: processes that grade texts
        context_length: largest number of tokens of a prompt and its completion together
    """

    def __init__(
        self, engine: RolloutEngine, policy: Policy, encoder: PromptEncoder, pool: GradingPool, context_length: int
    ) -> None:
        self._guard, self._policy, self._encoder, self._pool = EngineGuard(engine), policy, encoder, pool
        self._engine: EngineGuard | RolloutEngine = self._guard
        self.version = 0
        engine.adapter_rank = policy.adapter_rank
        self._guard.start(policy.folder, context_length)

    @timed("sync")
    def hold(self) -> None:
        """Gives the engine the policy's present weights, unless it has them already."""
        self._give(self._policy.version)
        self.version = self._policy.version

    def _give(self, version: int) -> None:
        if not self._guard.holds(version):
            self._guard.load(self._policy, version)

    @property
    def beats(self) -> int:
        """Returns the engine's signs of life so far."""
        return self._guard.engine.beats

    @property
    def metrics(self) -> dict[str, float]:
        """Returns what a step records of the engine: with `engine/canary_gap`, what the latest canary found."""
        gaps = self._guard.gaps.values()
        return self._guard.engine.metrics | ({"engine/canary_gap": max(gaps)} if gaps else {})

    def settle(self) -> None:
        """Waits until all processes that train have what they need of a shared engine."""
        self._guard.settle()

    def beside(self) -> Sampler:
        """Returns a copy for the background thread: an engine failure raises there instead of triggering a rebuild."""
        made = copy(self)
        made._engine = self._guard.engine
        return made

    def rebuild(self, reason: Exception) -> None:
        """Starts the engine anew, with the policy's present weights."""
        self._guard.rebuild(reason, self._policy, self._policy.version)

    def rollouts(
        self, problems: Sequence[Problem], prompts: Sequence[tuple[int, ...]], n: int, sampling: Sampling, seed: int
    ) -> list[RolloutGroup]:
        """Returns one group of `n` graded rollouts for every problem.

        Args:
            problems: problems that the answers are graded against
            prompts: token ids of each problem's prompt
            n: rollouts per problem
            sampling: rule by which tokens are drawn
            seed: random seed
        """
        with timed("generate"):
            completions = self._engine.generate(prompts, sampling, n, seed)
        with timed("grade"):
            texts = [[self._encoder.decode(c.token_ids) for c in group] for group in completions]
            pairs = [(problem, text) for problem, group in zip(problems, texts, strict=True) for text in group]
            verdicts = iter(self._pool.grade(pairs))
        return [
            RolloutGroup(
                problem=problem,
                prompt_ids=tuple(prompt),
                rollouts=tuple(
                    Rollout(
                        completion=completion,
                        text=text,
                        verdict=next(verdicts),
                        unclosed=self._encoder.ends_in_thought(prompt, text),
                    )
                    for completion, text in zip(group, group_texts, strict=True)
                ),
                policy_version=self.version,
            )
            for problem, prompt, group, group_texts in zip(problems, prompts, completions, texts, strict=True)
        ]

    def replies(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seed: int) -> list[Completion]:
        """Returns one completion for every prompt, from the engine's weights."""
        return [completion for (completion,) in self._engine.generate(prompts, sampling, 1, seed)]

    @contextmanager
    def at_start(self, needed: bool) -> Iterator[None]:
        """The engine has the weights that training began with while this context is entered.

        Processes that have to load together enter and leave it together. The engine keeps the weights that it has where
        none of them is in need of others.

        Args:
            needed: whether this process will ask for completions
        """
        self.settle()
        if not any(self._guard.engine.agreed(needed)):
            yield
            return
        with self._policy.at_start():
            self._give(0)
            yield
            self.settle()
