"""What one optimiser step measures of itself: sums, means over tokens, and when each phase ran."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ogls.records import Interval, Lane

_EPOCH = time.time() - time.perf_counter()  # when the clock that never jumps stood at 0


class Meter:
    """Collects over micro-batches; `metrics` names means and sums ``train/...`` and phases ``time/...`` (seconds).

    Phases do not contain one another; `intervals` says when they ran, for the timeline of optimiser step `step`.
    """

    def __init__(self, lane: Lane, step: int) -> None:
        self._lane: Lane = lane
        self._step = step
        self._sums: dict[str, float] = defaultdict(float)
        self._means: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.intervals: list[Interval] = []

    def add(self, name: str, value: float) -> None:
        self._sums[name] += value

    def mean(self, name: str, values: Tensor) -> None:
        """Take the mean over all elements of all calls."""
        self._means[name][0] += values.sum().item()
        self._means[name][1] += values.numel()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            start, end = _EPOCH + start, _EPOCH + time.perf_counter()
            self.intervals.append(Interval(lane=self._lane, phase=phase, step=self._step, start=start, end=end))

    def metrics(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in self._means.items() if count}
        values = {f"train/{name}": value for name, value in (self._sums | means).items()}
        for interval in self.intervals:
            name = f"time/{interval.phase}"
            values[name] = values.get(name, 0.0) + interval.end - interval.start
        return values
