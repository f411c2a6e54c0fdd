"""A step records sums, means over tokens, and when each of its phases ran.

A function names its phase by ``@timed("teacher")``. Whoever runs a step has all phases inside recorded by
``with metrics.recording():``. Outside of a step, phases are not recorded.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from ogls.records import Lane, Phase

if TYPE_CHECKING:
    from torch import Tensor  # the text half records phases, too, and does without torch

_EPOCH = time.time() - time.perf_counter()  # time at which the clock that never jumps was 0
_RECORDING: ContextVar[StepMetrics | None] = ContextVar("recording", default=None)


class StepMetrics:
    """StepMetrics collects what one half of an optimiser step measures.

    `metrics` names sums and means ``train/...``, and the seconds of phases ``time/...``; `phases` says when each ran.

    Args:
        lane: half of the step: ``rollouts`` or ``training``
        step: number of the optimiser step, from 1
    """

    def __init__(self, lane: Lane, step: int) -> None:
        self._lane: Lane = lane
        self._step = step
        self._totals: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)  # number of values behind each mean
        self._running: list[tuple[str, float]] = []  # phases within phases, and when each last began or went on
        self.phases: list[Phase] = []

    @classmethod
    def joined(cls, parts: Sequence[StepMetrics]) -> StepMetrics:
        """Returns one record of what several processes measured in a step: their sums, means, and mean seconds."""
        whole = cls(parts[0]._lane, parts[0]._step)
        for part in parts:
            for name, total in part._totals.items():
                whole._totals[name] += total / len(parts) if name.startswith("time/") else total
            for name, count in part._counts.items():
                whole._counts[name] += count
        return whole

    def add(self, name: str, value: float) -> None:
        """Adds `value` to the sum ``train/{name}``."""
        self._totals[f"train/{name}"] += value

    def mean(self, name: str, values: Tensor) -> None:
        """Adds `values` to the mean ``train/{name}``, which is taken over all elements of all calls."""
        if values.numel():
            self.add(name, values.sum().item())
            self._counts[f"train/{name}"] += values.numel()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The phases that `timed` names in this thread are recorded here while this context is entered."""
        token = _RECORDING.set(self)
        try:
            yield
        finally:
            _RECORDING.reset(token)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """The time spent inside this context is recorded as phase `name`; a phase within it interrupts it."""
        if self._running:
            self._note(*self._running[-1])
        self._running.append((name, time.perf_counter()))
        try:
            yield
        finally:
            self._note(*self._running.pop())
            if self._running:
                self._running[-1] = (self._running[-1][0], time.perf_counter())

    def metrics(self) -> dict[str, float]:
        """Returns every sum and mean, and the seconds of every phase, by name."""
        return {name: total / self._counts.get(name, 1) for name, total in self._totals.items()}

    def _note(self, name: str, start: float) -> None:
        start, end = _EPOCH + start, _EPOCH + time.perf_counter()
        self.phases.append(Phase(lane=self._lane, name=name, step=self._step, start=start, end=end))
        self._totals[f"time/{name}"] += end - start


@contextmanager
def timed(name: str) -> Iterator[None]:
    """The time spent inside this context, or in the function that it decorates, is recorded as phase `name`.

    It goes to the `StepMetrics` that is recording in this thread; without one, nothing is recorded.
    """
    metrics = _RECORDING.get()
    if metrics is None:
        yield
    else:
        with metrics.time(name):
            yield
