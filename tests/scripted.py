"""An engine that follows a script: deterministic, instant, no model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ogls.engine.base import RolloutEngine, Sampling, check_lengths
from ogls.records import Completion

Script = Callable[[Sequence[int], random.Random], Sequence[int]]


class ScriptedEngine(RolloutEngine):
    """`script(prompt_ids, rng)` gives the token ids of one completion; every token has log-probability -1."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.loads: list[int] = []

    def start(self, folder: Path, context_length: int) -> None:
        self.context_length = context_length

    def load(self, policy: Any, version: int) -> None:
        self.loads.append(version)

    @property
    def version(self) -> int:
        return self.loads[-1]

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        check_lengths(prompts, sampling, n, self.context_length)
        rng = random.Random(seed)
        return [[self._complete(prompt, sampling, rng) for _ in range(n)] for prompt in prompts]

    def _complete(self, prompt: Sequence[int], sampling: Sampling, rng: random.Random) -> Completion:
        ids = tuple(self.script(prompt, rng))
        cut = ids[: sampling.max_tokens]
        return Completion(
            token_ids=cut, logprobs=(-1.0,) * len(cut), finish_reason="stop" if len(ids) == len(cut) else "length"
        )

    def close(self) -> None:
        pass
