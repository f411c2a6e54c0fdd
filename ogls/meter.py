"""What one optimiser step measures of itself: sums, means over tokens, and seconds a phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Meter:
    """Collects over micro-batches; `metrics` names means and sums ``train/...`` and phases ``time/...`` (seconds)."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._means: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._seconds: dict[str, float] = defaultdict(float)

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
            self._seconds[phase] += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in self._means.items() if count}
        values = {f"train/{name}": value for name, value in (self._sums | means).items()}
        return values | {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
