"""A step records sums, means over tokens, and when each of its phases ran.

A function names its phase by ``@timed("teacher")``. Whoever runs a step has all phases inside recorded by
``with metrics.recording():``. Outside of a step, phases are not recorded.

A GPU works behind the program that gives it work. Where one is used, a phase begins and ends when the GPU gets there,
by its events, which are read when somebody asks for the figures: nothing waits for them within a step.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        self._running: list[tuple[str, _Mark]] = []  # phases within phases, and when each last began or went on
        self._first: _Mark | None = None
        self._noted: list[tuple[str, _Mark, _Mark]] = []  # phases whose seconds have not been read yet
        self._phases: list[Phase] = []

    @property
    def phases(self) -> list[Phase]:
        """Returns when each phase ran, in the order of their ends."""
        self._read()
        return self._phases

    def __getstate__(self) -> dict[str, Any]:
        self._read()  # another process cannot
        return self.__dict__

    @classmethod
    def joined(cls, parts: Sequence[StepMetrics]) -> StepMetrics:
        """Returns one record of what several processes measured in a step: their sums, means, and mean seconds."""
        whole = cls(parts[0]._lane, parts[0]._step)
        for part in parts:
            part._read()
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
        now = _mark()
        self._first = self._first or now
        if self._running:
            self._noted.append((*self._running[-1], now))
        self._running.append((name, now))
        try:
            yield
        finally:
            now = _mark()
            self._noted.append((*self._running.pop(), now))
            if self._running:
                self._running[-1] = (self._running[-1][0], now)

    def metrics(self) -> dict[str, float]:
        """Returns every sum and mean, and the seconds of every phase, by name."""
        self._read()
        return {name: total / self._counts.get(name, 1) for name, total in self._totals.items()}

    def _read(self) -> None:
        noted, self._noted = self._noted, []
        for name, *marks in noted:
            start, end = (_EPOCH + mark.seconds(self._first or mark) for mark in marks)
            self._phases.append(Phase(lane=self._lane, name=name, step=self._step, start=start, end=end))
            self._totals[f"time/{name}"] += end - start


@dataclass(frozen=True)
class _Mark:
    """A mark is a moment: of this program's clock, and, where a GPU is used, that at which the GPU gets there."""

    clock: float
    event: Any = None

    def seconds(self, first: _Mark) -> float:
        """Returns when it was by the clock; `first` is an earlier mark, made when the GPU had nothing to do."""
        if self.event is None or first.event is None:
            return self.clock
        self.event.synchronize()
        return first.clock + first.event.elapsed_time(self.event) / 1e3


def _mark() -> _Mark:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return _Mark(time.perf_counter())
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return _Mark(time.perf_counter(), event)


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
