"""Graded rollouts: an engine that has the policy's weights, and the pool that says which answers are right."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from typing import TYPE_CHECKING

from ogls.lessons.prompts import PromptEncoder
from ogls.records import Completion, Problem, Rollout, RolloutGroup, Sampling
from ogls.rollout.engine import RolloutEngine
from ogls.rollout.guard import EngineGuard
from ogls.system.step_metrics import StepMetrics
from ogls.tasks.grading import GradingPool

if TYPE_CHECKING:
    from ogls.module import SelfDistillation


class Sampler:
    """Samples from the module's policy, as it was when the engine was last told to `hold` it. The engine starts here.

    `version` is that of the weights that are sampled from.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        module: SelfDistillation,
        encoder: PromptEncoder,
        pool: GradingPool,
        context_length: int,
    ) -> None:
        self._guard, self._module, self._encoder, self._pool = EngineGuard(engine), module, encoder, pool
        self._engine: EngineGuard | RolloutEngine = self._guard
        self._held: int | None = None  # the version that the engine has; a frozen reply changes it
        self.version = 0
        self._guard.start(module.folder, context_length)

    def hold(self, version: int) -> None:
        """What follows is sampled from the policy's present weights, which are of this version."""
        if self._held != version:
            self._guard.load(self._module.policy, version)
        self.version = self._held = version

    def beside(self) -> Sampler:
        """The same for a thread beside the training: an engine that fails is not rebuilt there, but raises."""
        made = copy(self)
        made._engine = self._guard.engine
        return made

    def rebuild(self, reason: Exception) -> None:
        """A new engine, with the policy's present weights under the version that it had."""
        self._guard.rebuild(reason)

    def rollouts(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[tuple[int, ...]],
        n: int,
        sampling: Sampling,
        seed: int,
        meter: StepMetrics,
    ) -> list[RolloutGroup]:
        """`n` graded rollouts of every prompt."""
        with meter.time("generate"):
            completions = self._engine.generate(prompts, sampling, n, seed)
        with meter.time("grade"):
            texts = [[self._encoder.decode(c.token_ids) for c in group] for group in completions]
            pairs = [(problem, text) for problem, group in zip(problems, texts, strict=True) for text in group]
            verdicts = iter(self._pool.grade(pairs))
        return [
            RolloutGroup(
                problem=problem,
                prompt_ids=tuple(prompt),
                rollouts=tuple(
                    Rollout(completion=completion, text=text, verdict=next(verdicts))
                    for completion, text in zip(group, group_texts, strict=True)
                ),
                policy_version=self.version,
            )
            for problem, prompt, group, group_texts in zip(problems, prompts, completions, texts, strict=True)
        ]

    def replies(
        self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seed: int, frozen: bool
    ) -> list[Completion]:
        """One completion of every prompt, from the weights held or, `frozen`, from those that training began with.

        The latter are the weights of version 0, and the engine has them under that number.
        """
        version = 0 if frozen else self.version
        with self._module.policy.at_start() if frozen else nullcontext():
            if self._held != version:
                self._guard.load(self._module.policy, version)
                self._held = version
            return [completion for (completion,) in self._engine.generate(prompts, sampling, 1, seed)]
