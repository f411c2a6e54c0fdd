"""Several training processes share one engine, which the first of them speaks with for all."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from ogls.records import Completion, Sampling
from ogls.rollout.engine import Item, RolloutEngine
from ogls.system.exits import EngineFailed
from ogls.system.process_group import ProcessGroup

if TYPE_CHECKING:
    from ogls.policy.policy import Policy


class Together(RolloutEngine):
    """Process 0 alone speaks with `engine`; the others get their completions from it, or its exception.

    So an engine is rebuilt by all processes or by none. They start, load and compare in the same order. Completions
    each may ask for as often as it likes: whoever needs no more takes part by `settled` until all are at that point.

    Args:
        engine: engine that serves any number of processes
        group: processes that train together
    """

    remote = True

    def __init__(self, engine: RolloutEngine, group: ProcessGroup) -> None:
        self.engine, self.samples_policy, self._group = engine, engine.samples_policy, group

    @property
    def metrics(self) -> dict[str, float]:
        return self._told

    @property
    def beats(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns the engine's signs of life; in other processes the clock's, as they only wait for the first one."""
        return int(time.monotonic()) if self._group.rank else self.engine.beats

    def beat(self) -> None:
        self.engine.beat()

    def _start(self, folder: Path, context_length: int) -> None:
        self._group = self._group.patient()
        self.engine.adapter_rank, self.engine.thought_ids = self.adapter_rank, self.thought_ids
        self._told: dict[str, float] = {}
        self._together("start", lambda: self.engine.start(folder, context_length))

    def _load(self, policy: Policy) -> None:
        asking: Any = Asking(policy, lambda kind: self._tell((kind, None)))

        def loaded() -> None:
            try:
                self.engine.load(asking, 0)  # the version is known here
            finally:
                asking.finish()

        self._together("load", loaded, policy)

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        asked = self._asked("generate", ([tuple(prompt) for prompt in prompts], sampling, n, seed))
        return self._answers(asked)[self._group.rank]

    def agreed(self, own: Item) -> list[Item]:
        return [said for _, said in self._asked("agreed", own)]

    def settled(self) -> bool:
        asked = self._asked("done", None)
        if all(kind == "done" for kind, _ in asked):
            return True
        self._answers(asked)
        return False

    def each(self, check: Callable[[str, RolloutEngine], None]) -> None:
        def everywhere(name: str, engine: RolloutEngine) -> None:
            self._tell(("each", name))
            self._checked(check, name, engine)

        self._together("each", lambda: self.engine.each(everywhere), check=check)

    def _checked(self, check: Callable[[str, RolloutEngine], None], name: str, engine: RolloutEngine) -> None:
        """Calls `check` in every process, and raises its error in every process."""
        alone, failure = copy(self), None
        alone.engine = engine
        try:
            check(name, alone)
        except Exception as error:
            failure = plain(error)
        failures = [failure for failure in self._group.gathered(failure) if failure is not None]
        if failures:
            raise failures[0]

    def _close(self) -> None:
        if self._group.rank == 0:
            self.engine.close()

    # ---- what is said between the processes ----

    def _together(
        self,
        kind: str,
        call: Callable[[], Any],
        policy: Policy | None = None,
        check: Callable[[str, RolloutEngine], None] | None = None,
    ) -> Any:
        """Returns, in every process, what `call` returns in the first one, or raises its exception.

        Meanwhile the first one may need the others: for the policy's weights, of which each may hold a part, or for a
        check in which each has a part.
        """
        self._asked(kind, None)
        if self._group.rank == 0:
            answer = self._tried(call)
            self._tell(answer)
        else:
            while (answer := self._heard())[0] not in ("done", "error"):
                if answer[0] == "weights" and policy is not None:
                    for _ in policy.merged_weights():
                        pass
                elif answer[0] == "adapter" and policy is not None:
                    policy.save_adapter(None)
                elif answer[0] == "each" and check is not None:
                    with suppress(Exception):  # the first process has the same one
                        self._checked(check, answer[1], self.engine)
        return self._taken(answer)

    def _answers(self, asked: Sequence[tuple[str, Any]]) -> list[list[list[Completion]]]:
        """Returns the completions that each process has asked for; who has asked for none gets none."""
        if self._group.rank == 0:
            self._tell(self._tried(lambda: self._drawn(asked)))
            return self._taken(self._last)
        return self._taken(self._heard())

    def _drawn(self, asked: Sequence[tuple[str, Any]]) -> list[list[list[Completion]]]:
        """Returns completions as one process would draw that had all prompts, in the order before they were shared."""
        drawn: list[list[list[Completion]]] = [[] for _ in asked]
        alike = defaultdict(list)
        for rank, (_, order) in enumerate(asked):
            if order is not None:
                prompts, *how = order
                alike[tuple(how)] += [(i, rank, prompt) for i, prompt in enumerate(prompts)]
        for (sampling, n, seed), items in alike.items():
            items.sort(key=lambda item: item[:2])
            completions = self.engine.generate([prompt for *_, prompt in items], sampling, n, seed)
            for (_, rank, _), group in zip(items, completions, strict=True):
                drawn[rank].append(group)
        return drawn

    def _asked(self, kind: str, order: Any) -> list[tuple[str, Any]]:
        """Returns what each process asks for now.

        Raises:
            ValueError: they ask for what cannot be done together.
        """
        asked = self._group.gathered((kind, order))
        kinds = {kind for kind, _ in asked}
        if len(kinds) > 1 and not kinds <= {"generate", "done"}:
            raise ValueError(f"the training processes ask the engine for different things: {[k for k, _ in asked]}")
        return asked

    def _tried(self, call: Callable[[], Any]) -> tuple[str, Any]:
        try:
            return "done", (call(), self.engine.metrics)
        except Exception as error:
            return "error", plain(error)

    def _taken(self, answer: tuple[str, Any]) -> Any:
        kind, value = answer
        if kind == "error":
            raise value
        value, self._told = value
        return value

    def _tell(self, message: tuple[str, Any]) -> None:
        self._last = message
        dist.broadcast_object_list([message], src=0, group=self._group.connection)

    def _heard(self) -> tuple[str, Any]:
        message: list[Any] = [None]
        dist.broadcast_object_list(message, src=0, group=self._group.connection)
        return message[0]


class Asking:
    """Asking stands in for a policy that an engine reads, where all processes have to take part in the reading.

    Args:
        policy: policy whose weights are read
        begin: function that has the other processes begin the same, ``weights`` or ``adapter``
    """

    def __init__(self, policy: Policy, begin: Callable[[str], object]) -> None:
        self._policy, self._begin = policy, begin
        self.folder, self.lora, self.adapter_rank = policy.folder, policy.lora, policy.adapter_rank
        self._weights: Iterator[tuple[str, Tensor]] = iter(())

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        self._begin("weights")
        self._weights = self._policy.merged_weights()
        for name, value in self._weights:  # noqa: UP028 - `yield from` would end them with this generator
            yield name, value

    def save_adapter(self, folder: Path | str) -> None:
        self._begin("adapter")
        self._policy.save_adapter(folder)

    def finish(self) -> None:
        """Makes the weights whole that the others are in need of, where an engine has read a part of them only."""
        for _ in self._weights:
            pass


def plain(error: Exception) -> Exception:
    """Returns an error that every process can read, of the kind that the guard tells apart."""
    if isinstance(error, ValueError):
        return ValueError(str(error))
    if isinstance(error, EngineFailed):
        return EngineFailed(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
