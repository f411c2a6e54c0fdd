"""What every rollout engine does: take the policy's weights, and turn prompt ids into sampled ids.

Engines see token ids only. They never build a prompt, never decode for the loss, and never re-encode text.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ogls.records import Completion

if TYPE_CHECKING:
    from ogls.policy import Policy


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


class RolloutEngine(ABC):
    """Samples from the policy. The constructor stores settings; `start` does the work, once, in the training process.

    The order of calls is `start(folder, context_length)`, then `load(policy, version)` before the first `generate`
    and after every update, and at last `close()`.
    """

    @abstractmethod
    def start(self, folder: Path, context_length: int) -> None:
        """Read the model in `folder` (see `ogls.model.resolve_model`); prompt and completion share `context_length`."""

    @abstractmethod
    def load(self, policy: Policy, version: int) -> None:
        """Take over the policy's present weights. `version` is the number of updates that made them."""

    @property
    @abstractmethod
    def version(self) -> int:
        """The version of the weights that `generate` samples from; an error before the first `load`."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        """`n` completions for every prompt, in the order of the prompts. The same seed draws the same tokens."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. The engine may be started again afterwards."""


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


def end_token_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a completion: `eos_token_id` of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if file.is_file():
            ids = json.loads(file.read_text()).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    raise ValueError(f"{folder} names no end token: expected eos_token_id in generation_config.json or config.json")
