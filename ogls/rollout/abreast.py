"""Training processes that hold parts of the weights call an engine each, all of them at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ogls.records import Completion, Sampling
from ogls.rollout.engine import Item, RolloutEngine
from ogls.rollout.together import Asking, plain
from ogls.system.process_group import ProcessGroup

if TYPE_CHECKING:
    from ogls.policy.policy import Policy


class Abreast(RolloutEngine):
    """Each process has `engine` to itself, and all of them start, load and compare at the same time, or all fail.

    A weight of which each process holds a part is made whole by all of them at once, and so are the passes that an
    engine is compared with. So where the engine of one process fails, all have its error, and rebuild. Completions each
    may ask for as often as it likes: whoever needs no more takes part by `settled` until all are at that point.

    Args:
        engine: engine of this process
        group: processes that train together
    """

    def __init__(self, engine: RolloutEngine, group: ProcessGroup) -> None:
        self.engine, self.samples_policy, self._group = engine, engine.samples_policy, group
        self._failure: Exception | None = None  # of the call under way, which all processes have been told of
        self._waits = False

    @property
    def metrics(self) -> dict[str, float]:
        return self.engine.metrics

    @property
    def beats(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns the engine's signs of life; the clock's while this process waits for the others."""
        return self.engine.beats + (int(time.monotonic()) if self._waits else 0)

    def beat(self) -> None:
        self.engine.beat()

    def load(self, policy: Policy, version: int) -> None:
        weights: Any = Asking(policy, self._met)

        def loaded() -> None:
            try:
                self.engine.load(weights, version)
            finally:
                weights.finish()

        self._alike("load", loaded)
        self._version = version

    def agreed(self, own: Item) -> list[Item]:
        return self._met("agreed", own)

    def settled(self) -> bool:
        kinds = self._met("done", "done")
        if all(kind == "done" for kind in kinds):
            return True
        self._met("generate ends")
        return False

    def each(self, check: Callable[[str, RolloutEngine], None]) -> None:
        self._alike("each", lambda: check("", self))

    def _start(self, folder: Path, context_length: int) -> None:
        self._group = self._group.patient()
        self.engine.adapter_rank, self.engine.thought_ids = self.adapter_rank, self.thought_ids
        self._alike("start", lambda: self.engine.start(folder, context_length))

    def _load(self, policy: Policy) -> None:
        raise AssertionError("load does it, with the version")

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        return self._alike("generate", lambda: self.engine.generate(prompts, sampling, n, seed) if prompts else [])

    def _close(self) -> None:
        self.engine.close()

    def _alike(self, kind: str, call: Callable[[], Item]) -> Item:
        """Returns what `call` returns here, once it has returned in all processes.

        Raises:
            Exception: `call` fails in one of the processes; all raise the same.
        """
        self._met(kind, kind)
        try:
            answer = call()
        except Exception as error:
            if self._failure is None:
                self._met(f"{kind} ends", error)
            raise self._failure or error from error
        self._met(f"{kind} ends")
        return answer

    def _met(self, kind: str, said: Any = None) -> list[Any]:
        """Returns what all processes say once they are all here; an exception that one of them says, all raise.

        Raises:
            ValueError: they are in different places, which cannot go on together.
        """
        failed = isinstance(said, Exception)
        self._waits, self._failure = True, None
        try:
            met = self._group.gathered((kind, plain(said) if failed else said, failed))
        finally:
            self._waits = False
        kinds = {kind for kind, _, _ in met}
        failures = [what for _, what, failed in met if failed]
        if failures:
            self._failure = failures[0]
        elif len(kinds) > 1 and not kinds <= {"generate", "done"}:
            self._failure = ValueError(
                f"the training processes ask their engines for different things: {sorted(kinds)}"
            )
        if self._failure is not None:
            raise self._failure
        return [what for _, what, _ in met]
