"""The guard watches an engine and rebuilds it when it fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ogls.records import Completion, Sampling
from ogls.rollout.canary import Canary
from ogls.rollout.engine import RolloutEngine
from ogls.system.exits import EngineFailed
from ogls.system.watchdog import time_limit

if TYPE_CHECKING:
    from ogls.policy.policy import Policy

PATIENCE = 600.0
"""An engine may take this many seconds from one token to the next, and for any call without tokens but its start."""
START = 3600.0
"""An engine may take this many seconds to start: it reads weights, and may compile."""
_CANARIES, _TOKENS = 8, 16  # prompts, and tokens drawn after each


class EngineGuard:
    """A guard starts, loads and asks an engine, and makes sure that it samples from the policy's weights.

    The engine has failed if it raises an error, gives impossible completions, or gives no sign of life for `patience`,
    however long its calls take. It has also failed if the log-probabilities of what it draws after a load are not those
    of the policy (see `Canary`); the first load is checked as soon as there are prompts. A failed engine is closed,
    started and loaded again, and the same completions are asked for with the same seed. If it fails again, EngineFailed
    is raised. A ValueError is no failure of the engine: it means a setting or a prompt that cannot work, and is passed
    on.

    Args:
        engine: engine to be watched
        patience: seconds that the engine may take from one sign of life to the next (`RolloutEngine.beat`); None is ten
            minutes, and an hour for its start
        max_gap: largest mean difference of log-probabilities between engine and trainer. Sound bf16 engines were at
            0.01 to 0.04, depending on how sure the model is, because logits are rounded; weights that were not the
            policy's began at 0.2.
    """

    def __init__(self, engine: RolloutEngine, patience: float | None = None, max_gap: float = 0.1) -> None:
        self.engine, self.patience, self.start_patience = engine, patience or PATIENCE, patience or START
        self._prompts: list[Sequence[int]] = []  # the canary's, always the same, in all processes
        self.max_gap = max_gap
        self._canaries: dict[str, Canary] = {}  # one per sampler that can hold weights of its own
        self.gaps: dict[str, float] = {}  # what each of them found last
        self._loaded = self._checked = False

    def start(self, folder: Path, context_length: int) -> None:
        """Starts the engine with the model in `folder`, see `RolloutEngine.start`."""
        self._folder, self._context_length, self._loaded = folder, context_length, False
        with time_limit("starting the engine", self.start_patience):
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

    def settle(self) -> None:
        """Waits until all processes that train have what they need, and rebuilds with them an engine that fails.

        Raises:
            EngineFailed: the engine fails after it was rebuilt, too.
        """
        rebuilt = False
        while True:
            policy, version = self._policy, self.engine.version
            try:
                self._begin()
                if self.engine.settled():
                    return
                rebuilt = False
            except ValueError:
                raise
            except Exception as error:
                if rebuilt:
                    raise EngineFailed(f"the engine failed again after it was rebuilt: {_described(error)}") from error
                self.rebuild(error, policy, version)
                rebuilt = True

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        self._begin(prompts, sampling.max_tokens)
        if not prompts:
            return []
        with self._watched("generating"):
            return self.engine.generate(prompts, sampling, n, seed)

    def _begin(self, prompts: Sequence[Sequence[int]] = (), max_tokens: int = 0) -> None:
        """Chooses the canary's prompts where there are none yet, and listens to weights that were not checked yet.

        A process without prompts has to take part, since the policy's passes may need all of them.
        """
        if not self.engine.samples_policy:
            return
        if not self._prompts:
            chosen = self.engine.agreed((prompts[:_CANARIES], max_tokens))
            self._prompts = [prompt for own, _ in chosen for prompt in own][:_CANARIES]
            self._tokens = min(_TOKENS, max(tokens for _, tokens in chosen))
        if self._prompts and not self._checked:
            self._check()

    def _load(self, policy: Policy, version: int) -> None:
        self._policy = policy
        with self._watched("loading weights into the engine"):
            self.engine.load(policy, version)
        if self.engine.version != version:
            raise RuntimeError(f"the engine holds version {self.engine.version} of the weights, not {version}")
        self._loaded, self._checked = True, False
        if self._prompts:
            self._begin()

    def _check(self) -> None:
        self.gaps = {}
        with self._watched("comparing the engine with the policy"):
            self.engine.each(self._listen)
        self._checked = True

    def _listen(self, name: str, engine: RolloutEngine) -> None:
        canary = self._canaries.setdefault(name, Canary(self.max_gap))
        self.gaps[name] = canary.check(engine, self._policy, self._prompts, self._tokens)

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
        return time_limit(phase, self.patience, signs=lambda: self.engine.beats)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"
