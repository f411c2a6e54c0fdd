"""The guard watches an engine and rebuilds it when it fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from ogls.records import Completion, Sampling
from ogls.rollout.engine import RolloutEngine
from ogls.system.exits import EngineFailed
from ogls.system.watchdog import time_limit

if TYPE_CHECKING:
    from ogls.policy.policy import Policy

PATIENCE = 3600.0
"""A call of an engine may take this many seconds."""
_CANARIES, _TOKENS = 8, 16  # prompts, and tokens drawn after each


class EngineGuard:
    """A guard starts, loads and asks an engine, and makes sure that it samples from the policy's weights.

    The engine has failed if it raises an error, gives impossible completions, or takes longer than `patience`. It has
    also failed if the log-probabilities of what it draws after a load differ from the policy's by more than `max_gap`
    on average; the first load is checked as soon as there are prompts. A failed engine is closed, started and loaded
    again, and the same completions are asked for with the same seed. If it fails again, EngineFailed is raised. A
    ValueError is no failure of the engine: it means a setting or a prompt that cannot work, and is passed on.

    Args:
        engine: engine to be watched
        patience: seconds that any call of the engine may take; None is an hour
        max_gap: largest mean difference of log-probabilities between engine and trainer. Sound bf16 engines were at
            0.01 to 0.04, depending on how sure the model is, because logits are rounded; weights that were not the
            policy's began at 0.2.
    """

    def __init__(self, engine: RolloutEngine, patience: float | None = None, max_gap: float = 0.1) -> None:
        self.engine, self.patience, self.max_gap = engine, patience or PATIENCE, max_gap
        self._canaries: list[Sequence[int]] = []  # always the same prompts
        self._loaded = self._checked = False

    def start(self, folder: Path, context_length: int) -> None:
        """Starts the engine with the model in `folder`, see `RolloutEngine.start`."""
        self._folder, self._context_length, self._loaded = folder, context_length, False
        with self._watched("starting the engine"):
            self.engine.start(folder, context_length)

    def holds(self, version: int) -> bool:
        """Returns whether the engine has the weights of `version`."""
        return self._loaded and self.engine.version == version

    def load(self, policy: Policy, version: int) -> None:
        """Gives the engine the policy's present weights, and rebuilds it if it fails.

        Raises:
            EngineFailed: the engine fails after it was rebuilt, too.
        """
        try:
            self._load(policy, version)
        except ValueError:
            raise
        except Exception as error:
            self.rebuild(error, policy, version)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        """Returns `n` completions for every prompt, see `RolloutEngine.generate`, and rebuilds a failing engine once.

        Raises:
            EngineFailed: the engine fails after it was rebuilt, too.
        """
        if not prompts:
            return []
        policy, version = self._policy, self.engine.version
        try:
            return self._generate(prompts, sampling, n, seed)
        except ValueError:
            raise
        except Exception as error:
            self.rebuild(error, policy, version)
        try:
            return self._generate(prompts, sampling, n, seed)
        except Exception as error:
            raise EngineFailed(f"the engine failed again after it was rebuilt: {_described(error)}") from error

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        if not self._canaries:
            self._canaries, self._canary_tokens = list(prompts[:_CANARIES]), min(_TOKENS, sampling.max_tokens)
        if not self._checked:
            self._check()
        with self._watched("generating"):
            return self.engine.generate(prompts, sampling, n, seed)

    def _load(self, policy: Policy, version: int) -> None:
        self._policy = policy
        with self._watched("loading weights into the engine"):
            self.engine.load(policy, version)
        if self.engine.version != version:
            raise RuntimeError(f"the engine holds version {self.engine.version} of the weights, not {version}")
        self._loaded, self._checked = True, False
        if self._canaries:
            self._check()

    def _check(self) -> None:
        if self.engine.samples_policy:
            with self._watched("comparing the engine with the policy"):
                gap = logprob_gap(self.engine, self._policy, self._canaries, self._canary_tokens)
            if not gap <= self.max_gap:
                raise RuntimeError(
                    f"the engine does not sample from the policy: log-probs differ by {gap:.3f} on average, expected "
                    f"{self.max_gap} at most"
                )
        self._checked = True

    def rebuild(self, reason: Exception, policy: Policy, version: int) -> None:
        """Closes the engine, starts it anew, and gives it the present weights of `policy`, which are of `version`.

        Raises:
            EngineFailed: this fails, too.
        """
        print(f"The engine failed and is rebuilt: {_described(reason)}", file=sys.stderr, flush=True)
        with suppress(Exception), self._watched("closing the engine"):  # it is broken: a further error is no news
            self.engine.close()
        try:
            self.start(self._folder, self._context_length)
            self._load(policy, version)
        except Exception as error:
            raise EngineFailed(f"the engine failed and could not be rebuilt: {_described(error)}") from error

    def _watched(self, phase: str) -> AbstractContextManager[None]:
        return time_limit(phase, self.patience)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


def logprob_gap(engine: RolloutEngine, policy: Policy, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
    """Returns the mean of |log p_engine(token) - log p_policy(token)| over tokens that the engine draws.

    The tokens are drawn, not given: an engine that scores given tokens does not use its prefix cache, and a stale cache
    is one of the faults to be found.

    Args:
        engine: engine that has been given the weights of `policy`
        policy: policy to compare it with
        prompts: token ids of each prompt
        max_tokens: tokens that are drawn after each prompt at most
    """
    drawn = engine.generate(prompts, Sampling(max_tokens=max_tokens), 1, seed=0)
    completions = [completion for (completion,) in drawn]
    suffixes = [completion.token_ids for completion in completions]
    weight, bias = policy.head
    with torch.no_grad():
        states = policy.hidden(prompts, suffixes, range(len(prompts)))
        logprobs = linear(states.to(weight.dtype), weight, bias).float().log_softmax(-1)
        ids = torch.tensor([i for suffix in suffixes for i in suffix], device=logprobs.device)
        theirs = torch.tensor([p for completion in completions for p in completion.logprobs], device=logprobs.device)
        return float((logprobs.gather(1, ids[:, None])[:, 0] - theirs).abs().mean())
