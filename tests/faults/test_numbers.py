"""Numbers that are none, memory that runs out, steps that say nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning import Callback, Trainer

from ogls.algorithm import MicroBatch
from ogls.callbacks import StopWithoutSignal
from ogls.loss.objective import Distillation, States
from ogls.module import SelfDistillation
from ogls.system.exits import RunEnded
from ogls.system.step_metrics import StepMetrics
from ogls.tracking import tracker
from ogls.tracking.files import METRICS, read_rows
from tests.faults import small
from tests.scripted import ChainEngine


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "_PATIENCE_SERVER", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


class Poisoned(Distillation):
    """Loss, gradient or target of some steps is multiplied by something that is no number."""

    steps: ClassVar[dict[int, float]] = {}
    place: ClassVar[str] = "loss"
    step: ClassVar[int] = 0

    def __call__(self, states: States) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert states.hidden_target is not None
        value, extras = super().__call__(replace(states, hidden_target=states.hidden_target * self._factor("teacher")))
        value.register_hook(lambda gradient: gradient * self._factor("gradient"))
        return value * self._factor("loss"), extras

    def _factor(self, place: str) -> float:
        return self.steps.get(self.step, 1.0) if place == self.place else 1.0


class Poisoner(Callback):
    """Says which step it is."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        Poisoned.step = trainer.global_step


class Watch(Callback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append(small.weights(pl_module))


def run(folder: Path) -> Path:
    return folder / "small-s0-run"


@pytest.mark.fault("loss or gradient not finite")
@pytest.mark.parametrize(
    ("place", "value"),
    [("loss", float("nan")), ("loss", -float("inf")), ("gradient", float("inf")), ("teacher", float("nan"))],
)
def test_a_step_that_is_not_finite_moves_no_bit(
    place: str, value: float, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Poisoned, "steps", {1: value})
    monkeypatch.setattr(Poisoned, "place", place)
    watch = Watch()
    small.fit(tiny_model, tmp_path, epochs=1, objective=Poisoned(), callbacks=[Poisoner(), watch])
    before, after, then = watch.weights[0], watch.weights[1], watch.weights[2]
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(not torch.equal(then[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in watch.weights[3].values())
    rows = [row for row in read_rows(run(tmp_path) / METRICS) if "train/skipped" in row]
    assert [row["train/skipped"] for row in rows] == [0, 1, 0, 0]
    dumped = json.loads((run(tmp_path) / "skipped-step-000002.json").read_text())
    assert dumped["policy_version"] == 1
    assert dumped["lessons"][0]["token_ids"]


@pytest.mark.fault("full disk, read-only folder")
def test_a_batch_that_cannot_be_written_down_ends_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Poisoned, "steps", {1: float("nan")})
    (run(tmp_path) / "skipped-step-000002.json").mkdir(parents=True)  # where the file would have to be
    small.fit(tiny_model, tmp_path, epochs=1, objective=Poisoned(), callbacks=[Poisoner()])
    rows = [row for row in read_rows(run(tmp_path) / METRICS) if "train/skipped" in row]
    assert [row["train/skipped"] for row in rows] == [0, 1, 0, 0]


@pytest.mark.fault("loss or gradient not finite")
def test_three_such_steps_in_a_row_end_the_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Poisoned, "steps", {0: float("nan"), 2: float("nan"), 3: float("nan"), 4: float("nan")})
    with pytest.raises(RunEnded, match=r"not finite in 3 steps in a row; see .*skipped-step-000005.json") as caught:
        small.fit(tiny_model, tmp_path, epochs=2, objective=Poisoned(), callbacks=[Poisoner()])
    assert caught.value.exit_code == 1


class Cramped(SelfDistillation):
    """Has memory for micro-batches of `room` tokens by budget."""

    room: ClassVar[int] = 0

    def _observe(self, metrics: StepMetrics, batch: MicroBatch) -> None:
        super()._observe(metrics, batch)
        if self.tokens_per_micro_batch > self.room:
            for p in self.policy.trainable().values():
                p.grad = torch.ones_like(p)  # half-made gradients must not stay
            self.run_out()

    def run_out(self) -> None:
        raise torch.OutOfMemoryError("injected, as CUDA has it")


class CrampedOnCPU(Cramped):
    """Asks the processor's memory for more than any machine has."""

    def run_out(self) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.fault("out of memory")
@pytest.mark.parametrize("kind", [Cramped, CrampedOnCPU])
def test_out_of_memory_halves_the_micro_batch_and_nothing_else(
    kind: type[Cramped],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    expected = small.fit(tiny_model, tmp_path / "wide", epochs=1)
    monkeypatch.setattr(Cramped, "room", 4096 // 8)
    student = small.fit(tiny_model, tmp_path / "cramped", epochs=1, kind=kind)
    assert student.tokens_per_micro_batch == 512
    assert capsys.readouterr().err.count("Out of memory") == 3
    for name, value in small.weights(expected).items():
        torch.testing.assert_close(small.weights(student)[name], value, rtol=0, atol=1e-6)
    losses = [
        [row["train/loss"] for row in read_rows(run(tmp_path / folder) / METRICS) if "train/loss" in row]
        for folder in ("wide", "cramped")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    record_property("figure", f"losses in micro-batches of an eighth differ by {gap:.0e}")


class Alone(Cramped):
    """Has no memory for a single lesson unless its activations are computed anew."""

    def _observe(self, metrics: StepMetrics, batch: MicroBatch) -> None:
        assert len(batch.lessons) == 1
        SelfDistillation._observe(self, metrics, batch)
        if self.policy.gradient_checkpointing is not True:
            self.run_out()


@pytest.mark.fault("out of memory")
def test_a_single_lesson_without_memory_has_its_activations_computed_anew(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_by_one = {"tokens_per_micro_batch": 1, "steps_per_epoch": 1}
    expected = small.fit(tiny_model, tmp_path / "wide", epochs=1, **one_by_one)
    student = small.fit(tiny_model, tmp_path / "cramped", epochs=1, kind=Alone, **one_by_one)
    said = capsys.readouterr().err
    assert said.count("Out of memory: now gradient checkpointing") == said.count("Out of memory") == 1
    assert student.tokens_per_micro_batch == 1
    for name, value in small.weights(expected).items():
        torch.testing.assert_close(small.weights(student)[name], value, rtol=0, atol=1e-6)


@pytest.mark.fault("out of memory")
def test_the_fourth_time_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        small.fit(tiny_model, tmp_path, epochs=1, kind=Cramped)


@pytest.mark.fault("no signal: all right or all wrong")
def test_steps_without_a_signal_end_the_run_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RunEnded, match=r"no step had a lesson for 3 steps.*accuracy 1\.000"):
        small.fit(tiny_model, tmp_path, engine=ChainEngine(slips=0.0), callbacks=[StopWithoutSignal(max_silent=3)])
