"""What one optimiser step measures of itself: sums, means over tokens, and when each phase ran.

A function says which phase it is (``@timed("teacher")``), and whoever runs a step says where that goes
(``with metrics.recording():``). Outside of a step, phases are not recorded.
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

_EPOCH = time.time() - time.perf_counter()  # when the clock that never jumps stood at 0
_RECORDING: ContextVar[StepMetrics | None] = ContextVar("recording", default=None)


class StepMetrics:
    """StepMetrics collects what the micro-batches and phases of optimiser step `step` measure.

    `metrics` names means and sums ``train/...`` and the seconds of phases ``time/...``; `phases` says when each ran.
    """

    def __init__(self, lane: Lane, step: int) -> None:
        self._lane: Lane = lane
        self._step = step
        self._totals: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)  # of the values that a mean is over
        self._running: list[tuple[str, float]] = []  # phases within phases, and when each went on
        self.phases: list[Phase] = []

    @classmethod
    def joined(cls, parts: Sequence[StepMetrics]) -> StepMetrics:
        """Returns what several processes measured of one step: sums and means over all, and their mean seconds."""
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
        """Adds `values` to the mean ``train/{name}``, which is over all elements of all calls."""
        if values.numel():
            self.add(name, values.sum().item())
            self._counts[f"train/{name}"] += values.numel()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Has the phases that `timed` names inside, in this thread, recorded here."""
        token = _RECORDING.set(self)
        try:
            yield
        finally:
            _RECORDING.reset(token)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Records what runs inside as phase `name`; a phase within it interrupts it."""
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
        """Returns every sum and mean, and the seconds of every phase."""
        return {name: total / self._counts.get(name, 1) for name, total in self._totals.items()}

    def _note(self, name: str, start: float) -> None:
        start, end = _EPOCH + start, _EPOCH + time.perf_counter()
        self.phases.append(Phase(lane=self._lane, name=name, step=self._step, start=start, end=end))
        self._totals[f"time/{name}"] += end - start


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Records what runs inside (or, as a decorator, the function) as phase `name` of the step that is recorded now."""
    metrics = _RECORDING.get()
    if metrics is None:
        yield
    else:
        with metrics.time(name):
            yield
