"""What every rollout engine does: take the policy's weights, and turn prompt ids into sampled ids.

Engines see token ids only. They never build a prompt, never decode for the loss, and never re-encode text.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ogls.records import Completion, Sampling

if TYPE_CHECKING:
    from ogls.policy.policy import Policy


class RolloutEngine(ABC):
    """Samples from the policy. The constructor stores settings; `start` does the work, once, in the training process.

    The order of calls is `start(folder, context_length)`, then `load(policy, version)` before the first `generate`
    and after every update, and at last `close()`. An engine implements `_start`, `_load`, `_generate` and `_close`;
    that the order is kept, that the prompts fit and that the completions can be true is seen to here.
    """

    samples_policy: bool = True
    """Completions and log-probs come from the policy's weights: False for an engine that follows a script."""

    copies_policy: ClassVar[bool] = True
    """`load` copies weights: False for an engine that samples with the policy itself, and so has to wait for it."""

    _context_length: int | None = None
    _version: int | None = None

    def start(self, folder: Path, context_length: int) -> None:
        """Read the model in `folder`; prompt and completion share `context_length` tokens."""
        self._start(folder, context_length)
        self._context_length = context_length
        self._end_token_ids, self._vocab_size = end_token_ids(folder), vocab_size(folder)

    def load(self, policy: Policy, version: int) -> None:
        """Take over the policy's present weights. `version` is the number of updates that made them."""
        if self._context_length is None:
            raise ValueError("the engine is not running: call start(folder, context_length) first")
        self._load(policy)
        self._version = version

    @property
    def version(self) -> int:
        """The version of the weights that `generate` samples from; an error before the first `load`."""
        if self._version is None:
            raise ValueError("the engine has no weights yet: call load(policy, version) first")
        return self._version

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        """`n` completions for every prompt, in the order of the prompts. The same seed draws the same tokens."""
        assert self.version is not None
        assert self._context_length is not None
        check_lengths(prompts, sampling, n, self._context_length)
        completions = self._generate(prompts, sampling, n, seed)
        check_completions(completions, len(prompts), sampling, n, self._vocab_size)
        return completions

    def close(self) -> None:
        """Give the memory back. The engine may be started again afterwards."""
        self._version = self._context_length = None
        self._close()

    @abstractmethod
    def _start(self, folder: Path, context_length: int) -> None: ...

    @abstractmethod
    def _load(self, policy: Policy) -> None: ...

    @abstractmethod
    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]: ...

    @abstractmethod
    def _close(self) -> None: ...


def check_lengths(prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, context_length: int) -> None:
    """Refuse what does not fit, before anything is sampled."""
    if n < 1:
        raise ValueError(f"n, the completions a prompt, must be at least 1, got {n}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: an engine needs at least one token to continue")
        if len(prompt) + sampling.max_tokens > context_length:
            raise ValueError(
                f"prompt {i} does not fit: {len(prompt)} prompt tokens + max_tokens {sampling.max_tokens} = "
                f"{len(prompt) + sampling.max_tokens}, but the context holds {context_length}"
            )


def check_completions(
    completions: Sequence[Sequence[Completion]], prompts: int, sampling: Sampling, n: int, vocab_size: int
) -> None:
    """RuntimeError for completions that no engine in order gives. An empty completion is none of them."""
    counts = [len(group) for group in completions]
    if counts != [n] * prompts:
        raise RuntimeError(f"the engine was asked for {prompts} x {n} completions, got {counts[:20]}")
    for completion in (c for group in completions for c in group):
        ids, logprobs = completion.token_ids, completion.logprobs
        if not all(0 <= i < vocab_size for i in ids):
            raise RuntimeError(f"the engine gave a token id outside of the vocabulary of {vocab_size}")
        if len(ids) > sampling.max_tokens or len(logprobs) != len(ids) or not all(map(math.isfinite, logprobs)):
            raise RuntimeError(
                f"the engine gave {len(ids)} tokens of {sampling.max_tokens} and {len(logprobs)} log-probs: expected "
                "one finite number a token"
            )
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the engine ended a completion with {completion.finish_reason!r}")


def vocab_size(folder: Path) -> int:
    """Rows of the output head, from config.json."""
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def end_token_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a completion: `eos_token_id` of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if file.is_file():
            ids = json.loads(file.read_text()).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    raise ValueError(f"{folder} names no end token: expected eos_token_id in generation_config.json or config.json")
