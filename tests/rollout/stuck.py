"""Engines that do not take what they are given, as a real one would if its sync did nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace

from ogls.policy.policy import Policy
from ogls.records import Completion, Sampling
from ogls.rollout.transformers import TransformersEngine


class StuckEngine(TransformersEngine):
    """Samples for ever from a copy of the weights that it was given first."""

    kept: Policy | None = None

    def _load(self, policy: Policy) -> None:
        self.kept = self.kept or copy.deepcopy(policy)
        super()._load(self.kept)


class UnreadEngine(TransformersEngine):
    """Samples for ever from the weights in the policy's folder."""

    def _load(self, policy: Policy) -> None:
        super()._load(Policy(policy.name, lora=policy.lora, dtype=policy.dtype).load())


class Rounding:
    """Log-probabilities are off by so much, as in bf16; where an engine draws the same tokens, by the same."""

    noise = 0.03

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        drawn = super()._generate(prompts, sampling, n, seed)  # pyright: ignore[reportAttributeAccessIssue]
        return [[self._off(completion) for completion in group] for group in drawn]

    def _off(self, completion: Completion) -> Completion:
        rng = random.Random(str(completion.token_ids))
        return replace(completion, logprobs=tuple(p + rng.gauss(0, self.noise) for p in completion.logprobs))


class RoundingEngine(Rounding, TransformersEngine):
    """Sound, but for rounding."""


class StuckRoundingEngine(Rounding, StuckEngine):
    """Stuck, which rounding hides for a while."""
