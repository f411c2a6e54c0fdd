"""When phases run: by the clock, and on a GPU, which works behind the program, by its events."""

from __future__ import annotations

import pickle
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ogls.system import step_metrics
from ogls.system.step_metrics import StepMetrics, timed


class Gpu:
    """Works off what it is given, one thing after the other; the program's clock and its own go by hand."""

    def __init__(self) -> None:
        self.clock = self.free_at = 100.0

    def launch(self, seconds: float) -> None:
        self.clock += 0.001  # what the program needs to ask for it
        self.free_at = max(self.free_at, self.clock) + seconds

    def event(self, **_: Any) -> Event:
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = max(self.gpu.free_at, self.gpu.clock)

    def synchronize(self) -> None:
        self.gpu.clock = max(self.gpu.clock, self.at)

    def elapsed_time(self, later: Event) -> float:
        assert self.gpu.clock >= later.at, "asked before it was there"
        return 1e3 * (later.at - self.at)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(step_metrics, "time", SimpleNamespace(perf_counter=lambda: made.clock))
    return made


def test_a_phase_on_a_gpu_takes_as_long_as_the_gpu_does(gpu: Gpu) -> None:
    metrics = StepMetrics("training", 1)
    with metrics.recording(), timed("student"):
        gpu.launch(2.0)
        with timed("teacher"):
            gpu.launch(3.0)
        gpu.launch(4.0)
    assert gpu.clock < 100.1, "nothing has waited"
    assert metrics.metrics() == pytest.approx({"time/student": 6.0, "time/teacher": 3.0}, abs=0.01)
    assert [(p.name, round(p.end - p.start)) for p in metrics.phases] == [
        ("student", 2),
        ("teacher", 3),
        ("student", 4),
    ]
    assert all(a.end == b.start for a, b in zip(metrics.phases, metrics.phases[1:], strict=False))


def test_what_another_process_gets_has_been_read(gpu: Gpu) -> None:
    metrics = StepMetrics("training", 1)
    with metrics.time("student"):
        gpu.launch(2.0)
    there = pickle.loads(pickle.dumps(metrics))
    assert there.metrics() == metrics.metrics() == pytest.approx({"time/student": 2.0}, abs=0.01)


def test_without_a_gpu_it_is_the_clock() -> None:
    metrics, begun = StepMetrics("training", 1), time.time()
    with metrics.time("student"):
        time.sleep(0.05)
    (phase,) = metrics.phases
    assert 0.05 <= phase.end - phase.start < 1.0
    assert begun - 0.01 <= phase.start <= phase.end <= time.time() + 0.01
