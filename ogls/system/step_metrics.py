"""What one optimiser step measures of itself: sums, means over tokens, and when each phase ran."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from ogls.records import Lane, Phase

_EPOCH = time.time() - time.perf_counter()  # when the clock that never jumps stood at 0


class StepMetrics:
    """Collects over micro-batches; `metrics` names means and sums ``train/...`` and phases ``time/...`` (seconds).

    Phases do not contain one another; `intervals` says when they ran, for the timeline of optimiser step `step`.
    """

    def __init__(self, lane: Lane, step: int) -> None:
        self._lane: Lane = lane
        self._step = step
        self._totals: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)  # of the values that a mean is over
        self.intervals: list[Phase] = []

    @classmethod
    def joined(cls, parts: Sequence[StepMetrics]) -> StepMetrics:
        """What several processes measured of one step: sums and means over all of them, seconds of the average one."""
        whole = cls(parts[0]._lane, parts[0]._step)
        for part in parts:
            for name, total in part._totals.items():
                whole._totals[name] += total / len(parts) if name.startswith("time/") else total
            for name, count in part._counts.items():
                whole._counts[name] += count
        return whole

    def add(self, name: str, value: float) -> None:
        self._totals[f"train/{name}"] += value

    def mean(self, name: str, values: Tensor) -> None:
        """Take the mean over all elements of all calls."""
        if values.numel():
            self.add(name, values.sum().item())
            self._counts[f"train/{name}"] += values.numel()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            start, end = _EPOCH + start, _EPOCH + time.perf_counter()
            self.intervals.append(Phase(lane=self._lane, phase=phase, step=self._step, start=start, end=end))
            self._totals[f"time/{phase}"] += end - start

    def metrics(self) -> dict[str, float]:
        return {name: total / self._counts.get(name, 1) for name, total in self._totals.items()}
