"""An engine that says what it reads of the weights that it was given, and that fails in one process alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

from ogls.policy.policy import Policy
from ogls.records import Completion, Sampling
from ogls.rollout.canary import logprobs
from tests.scripted import ScriptedEngine
from tests.test_overlays import reflecting

REPLY = 100  # tokens of a reflection, at most


class Sincere(ScriptedEngine):
    """Follows the script of `reflecting`, but gives some problems right answers alone, on which nothing is reflected.

    Log-probs are those of a copy of the policy. At each of the loads or calls with the numbers `fails`, counted from 0,
    it fails: at a load after the first of the weights.
    """

    samples_policy = True

    def __init__(self, model: Path, loads: Sequence[int] = (), calls: Sequence[int] = ()) -> None:
        worked = reflecting(model)
        super().__init__(self._some_right, dict.fromkeys(calls, "die"))
        self._worked, self._right = worked.script, reflecting(model, slips=0.0).script
        self._model, self._failing = model, loads
        self.events: list[str] = []

    def _some_right(self, prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
        return (self._worked if crc32(bytes(str(prompt), "utf8")) % 2 else self._right)(prompt, rng)

    def load(self, policy: Any, version: int) -> None:
        copy = Policy(str(self._model), lora=None, dtype="float32").load()
        values = {name: p.detach() for name, p in copy.trainable().items()}
        for name, value in policy.merged_weights():
            if len(self.loads) in self._failing:
                self.loads.append(version)
                self.events.append("failed load")
                raise RuntimeError("the engine died amid a load, as it was told to")
            values[name] = value
        copy.load_trainable(values)
        self._copy = copy
        super().load(policy, version)
        self.events.append(f"load {version}")

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        self.events.append("reflect" if sampling.max_tokens == REPLY else "canary" if n == 1 else "draw")
        drawn = super()._generate(prompts, sampling, n, seed)
        return [
            [replace(c, logprobs=tuple(logprobs(self._copy, [prompt], [c.token_ids])[0].tolist())) for c in completions]
            for prompt, completions in zip(prompts, drawn, strict=True)
        ]
