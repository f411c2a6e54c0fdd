"""A rollout engine takes the policy's weights and samples after prompts.

Engines see token ids only. They never build a prompt and never encode or decode text.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from ogls.policy.pretrained import vocab_size
from ogls.records import Completion, Sampling
from ogls.system.memory.serving import Serving
from ogls.system.memory.shapes import Shapes
from ogls.system.seeds import derive

if TYPE_CHECKING:
    from ogls.policy.policy import Policy

Item = TypeVar("Item")


class RolloutEngine(ABC):
    """An engine samples from the policy. Its constructor only stores settings; `start` reads the model.

    The order of calls is `start(folder, context_length)`, then `load(policy, version)` before the first `generate`
    and after every update, and at last `close()`. A subclass implements `_start`, `_load`, `_generate` and `_close`.
    This class checks that the order is kept, that the prompts fit, and that the completions are possible ones.
    """

    samples_policy: bool = True
    """Completions and log-probs come from the policy's weights. It is False for an engine that follows a script."""

    copies_policy: ClassVar[bool] = True
    """`load` copies weights. It is False for an engine that samples with the policy itself, and has to wait for it."""

    takes_process: ClassVar[bool] = False
    """It takes torch.distributed and a GPU for itself: of several training processes, each gives it a process of its
    own. This is False for an engine that shares its process with the trainer, or is somewhere else."""

    remote: ClassVar[bool] = False
    """Sampling happens in processes of others: it needs none of its own, and one engine does for all that train."""

    adapter_rank: int | None = None
    """Rank of the policy's adapter, 0 where it has none: set before `start` by whoever knows the policy."""

    thought_ids: tuple[int, int] | None = None
    """Tokens that begin and end a thought: set before `start` where thoughts have a budget, by whoever knows them."""

    cache_bytes: int | None = None
    """Bytes for keys and values, as a memory plan decided before `start`; None without a plan."""

    beats: int = 0
    """Signs of life so far. An engine that gives none for minutes while it works is taken for hung."""

    _context_length: int | None = None
    _version: int | None = None

    def start(self, folder: Path, context_length: int) -> None:
        """Reads the model in `folder`; a prompt and its completion have at most `context_length` tokens together."""
        self._start(folder, context_length)
        self._context_length = context_length
        self._end_token_ids, self._vocab_size = end_token_ids(folder), vocab_size(folder)

    def load(self, policy: Policy, version: int) -> None:
        """Takes over the policy's present weights; `version` is the number of updates that they have had."""
        if self._context_length is None:
            raise ValueError("the engine is not running: call start(folder, context_length) first")
        self._load(policy)
        self._version = version

    def beat(self) -> None:
        """Gives a sign of life; `_generate` calls this at every token, or every few minutes at the least."""
        self.beats += 1

    def check_device(self, kind: str) -> None:
        """Raises ValueError where a setting cannot work on a device of this kind, ``cpu`` or ``cuda``."""
        return

    def serving(self, shapes: Shapes) -> Serving | None:
        """Returns a count of what the engine takes of the device; None where it takes no memory of its own."""
        return None

    @property
    def asked_cache(self) -> int | None:
        """Returns the bytes for keys and values that the configuration asks for; None leaves them to a plan."""
        return None

    @property
    def metrics(self) -> dict[str, float]:
        """Returns what a step should record of the engine, by the names of metrics."""
        return {}

    def each(self, check: Callable[[str, RolloutEngine], None]) -> None:
        """Calls `check` with every sampler that can hold weights of its own, by its name, as an engine by itself.

        Of several samplers one whose check raises a RuntimeError is left out.

        Raises:
            RuntimeError: no sampler is left.
        """
        check("", self)

    def agreed(self, own: Item) -> list[Item]:
        """Returns `own` of every process that trains with this engine, in the order of their ranks."""
        return [own]

    def settled(self) -> bool:
        """Returns whether no process waits for completions any more; if not, this call has served one round of them."""
        return True

    @property
    def version(self) -> int:
        """Returns the version of the weights that `generate` samples from.

        Raises:
            ValueError: no weights have been loaded yet.
        """
        if self._version is None:
            raise ValueError("the engine has no weights yet: call load(policy, version) first")
        return self._version

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        """Returns `n` completions for every prompt, in the order of the prompts.

        Args:
            prompts: token ids of each prompt
            sampling: rule by which tokens are drawn
            n: completions per prompt
            seed: random seed; what is drawn after a prompt follows from it and from the prompt (`prompt_seeds`), not
                from the other prompts, so that processes which share out the prompts draw what one would draw

        Raises:
            ValueError: a prompt is empty or too long for the context, or thoughts have a budget and the engine was not
                told before its start which tokens begin and end them.
            RuntimeError: the engine gave something that is no completion of these prompts.
        """
        assert self.version is not None
        assert self._context_length is not None
        check_lengths(prompts, sampling, n, self._context_length)
        if sampling.thinking_token_budget is not None and self.thought_ids is None:
            raise ValueError("a thinking_token_budget needs the engine's thought_ids: set them before its start")
        completions = self._generate(prompts, sampling, n, seed)
        check_completions(completions, len(prompts), sampling, n, self._vocab_size)
        if sampling.thinking_token_budget is not None and self.thought_ids is not None:
            check_thoughts(completions, prompts, sampling.thinking_token_budget, self.thought_ids)
        return completions

    def close(self) -> None:
        """Gives the engine's memory back; it may be started again afterwards."""
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


def prompt_seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """Returns a random seed per prompt: a function of `seed`, the prompt, and how often it came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in map(tuple, prompts):
        seeds.append(derive(seed, seen[prompt], *prompt))
        seen[prompt] += 1
    return seeds


def check_lengths(prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, context_length: int) -> None:
    """Raises ValueError if a prompt and its completions do not fit into the context, or `n` is below 1."""
    if n < 1:
        raise ValueError(f"n, the completions per prompt, must be at least 1, got {n}")
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
    """Raises RuntimeError for completions that no working engine gives; an empty completion is possible."""
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
                "one finite number per token"
            )
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the engine ended a completion with {completion.finish_reason!r}")


def check_thoughts(
    completions: Sequence[Sequence[Completion]], prompts: Sequence[Sequence[int]], budget: int, ids: tuple[int, int]
) -> None:
    """Raises RuntimeError if a thought has more than `budget` tokens; what a prompt thinks itself is no fault."""
    for prompt, group in zip(prompts, completions, strict=True):
        before = thought_length(prompt, ids)
        for completion in group:
            length = before
            for token in completion.token_ids:
                length = thought_length([token], ids, length)
                if length is not None and length > max(budget, before or 0):
                    raise RuntimeError(
                        f"the engine went on with a thought of {length} tokens at a thinking_token_budget of {budget}: "
                        "it takes no account of it"
                    )


def thought_length(token_ids: Sequence[int], ids: tuple[int, int], before: int | None = None) -> int | None:
    """Returns the number of tokens since the latest thought was begun; None where none is open.

    Args:
        token_ids: tokens that follow each other
        ids: tokens that begin and end a thought
        before: the same for what stands before these tokens
    """
    length = before
    for token in token_ids:
        if token in ids:
            length = 0 if token == ids[0] else None
        elif length is not None:
            length += 1
    return length


def end_token_ids(folder: Path) -> tuple[int, ...]:
    """Returns the ids that end a completion: ``eos_token_id`` of generation_config.json, or else of config.json.

    Raises:
        ValueError: neither file has one.
    """
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if file.is_file():
            ids = json.loads(file.read_text()).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    raise ValueError(f"{folder} names no end token: expected eos_token_id in generation_config.json or config.json")
