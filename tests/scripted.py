"""An engine that follows a script: deterministic, instant, no model; and that fails on command."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ogls.policy.pretrained import load_tokenizer
from ogls.records import Completion, Sampling
from ogls.rollout.engine import RolloutEngine, prompt_seeds
from ogls.tasks.chains import Chain

Script = Callable[[Sequence[int], random.Random], Sequence[int]]
Fault = Literal["die", "hang", "empty", "garbage", "stale", "slow", "long"]


def numbers(prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
    """A script that knows nothing, and that another process can import."""
    return [rng.randrange(3, 300) for _ in range(5)]


class ScriptedEngine(RolloutEngine):
    """`script(prompt_ids, rng)` gives the token ids of one completion; every token has log-probability -1.

    `faults` happen at the calls with these numbers, counted from 0 over the engine's life: "stale" at a `load`, which
    then keeps the old weights, the others at a `generate`.
    """

    samples_policy = False

    def __init__(self, script: Script, faults: Mapping[int, Fault] | None = None) -> None:
        self.script, self.faults = script, dict(faults or {})
        self.loads: list[int] = []
        self.starts = self.calls = 0
        self.sampled: list[Sampling] = []

    def load(self, policy: Any, version: int) -> None:
        super().load(policy, version)
        if self.faults.get(len(self.loads)) == "stale":
            self._version = version - 1
        self.loads.append(version)

    def _start(self, folder: Path, context_length: int) -> None:
        self.starts += 1

    def _load(self, policy: Any) -> None:
        pass

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        fault = self.faults.get(self.calls)
        self.calls += 1
        self.sampled.append(sampling)
        if fault == "die":
            raise RuntimeError("the engine died, as it was told to")
        if fault == "hang":
            time.sleep(600)
        if fault == "slow":
            time.sleep(0.2)
        for _ in range(40 * (fault == "long")):  # token by token, twelve seconds in all
            time.sleep(0.3)
            self.beat()
        drawn = zip(prompts, map(random.Random, prompt_seeds(prompts, seed)), strict=True)
        return [[self._complete(prompt, sampling, rng, fault) for _ in range(n)] for prompt, rng in drawn]

    def _complete(
        self, prompt: Sequence[int], sampling: Sampling, rng: random.Random, fault: Fault | None
    ) -> Completion:
        ids = {"empty": (), "garbage": (10**9, -1)}.get(fault or "", tuple(self.script(prompt, rng)))
        cut = ids[: sampling.max_tokens]
        return Completion(
            token_ids=cut, logprobs=(-1.0,) * len(cut), finish_reason="stop" if len(ids) == len(cut) else "length"
        )

    def _close(self) -> None:
        pass


class ChainEngine(ScriptedEngine):
    """Works arithmetic chains, with a slip in so many of their steps."""

    def __init__(self, slips: float = 0.4, faults: Mapping[int, Fault] | None = None) -> None:
        super().__init__(self._work, faults)
        self.slips = slips

    def _start(self, folder: Path, context_length: int) -> None:
        super()._start(folder, context_length)
        self._tokenizer = load_tokenizer(folder)

    def _work(self, prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
        text = Chain.parse(str(self._tokenizer.decode(prompt))).work(rng, self.slips)
        return [*self._tokenizer(text, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]


class Apart(ChainEngine):
    """Wants a process of its own, as vLLM does, and writes down what it finds there."""

    takes_process = True

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.trainer = folder, os.getpid()

    def _start(self, folder: Path, context_length: int) -> None:
        super()._start(folder, context_length)
        group = [
            name for name in os.environ if "RANK" in name or "WORLD" in name or name.startswith(("MASTER_", "TORCHE"))
        ]
        found = {"trainer": self.trainer, "group": group, "initialized": torch.distributed.is_initialized()}
        (Path(self.folder) / f"engine-{os.getpid()}.json").write_text(json.dumps(found))


class PeakingEngine(ChainEngine):
    """Slips least with version 8 of the weights, so that of three epochs of four steps the second is the best."""

    def _work(self, prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
        self.slips = 0.1 + 0.05 * abs(8 - self.version)
        return super()._work(prompt, rng)


class LatexEngine(ChainEngine):
    """Works chains in LaTeX; asked for a reflection, it quotes the first line raw, in one form or another."""

    line = "Since \\frac{2}{2} \\cdot \\boxed{1} \\neq 0, go on."
    forms = (
        "<think>\nIs it <quote>this</quote>?\n</think>\n\n<quote>{line}</quote>\n<idea>Use \\(a^2\\).</idea>",
        'Here it is:\n```json\n{{"quote": "{line}", "idea": "Use \\(a^2\\)."}}\n```\nHope this helps!',
    )

    def _work(self, prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
        if "attempt:" in self._tokenizer.decode(prompt):
            said = rng.choice(self.forms).format(line=self.line)
            return [*self._tokenizer(said, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]
        return [*self._tokenizer(self.line + "\n", add_special_tokens=False)["input_ids"], *super()._work(prompt, rng)]
