"""A run whose engine fails: the same losses and weights, or a checkpoint and exit code 75."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ogls.rollout import guard
from ogls.system.exits import EngineFailed
from ogls.tracking import tracker
from ogls.tracking.files import METRICS, read_rows
from tests.faults import small
from tests.scripted import ChainEngine, Fault


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "_PATIENCE_SERVER", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def losses(folder: Path) -> dict[int, float]:
    rows = read_rows(folder / "small-s0-run" / METRICS)
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert len(set(steps)) == len(steps), "a step twice"
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def unbroken(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[int, float], Any]]:
    """Losses and weights of two epochs in which nothing fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "_PATIENCE_SERVER", 0.1)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        folder = tmp_path_factory.mktemp("unbroken")
        student = small.fit(tiny_model, folder, epochs=2)
        yield losses(folder), small.weights(student)


def the_same(student: Any, folder: Path, unbroken: tuple[dict[int, float], Any]) -> None:
    assert losses(folder) == unbroken[0]
    assert list(losses(folder)) == list(range(1, 2 * small.STEPS + 1))
    for name, value in small.weights(student).items():
        assert torch.equal(value, unbroken[1][name]), name


def marked(fault: Fault, name: str) -> Any:
    return pytest.param(fault, marks=pytest.mark.fault(name))


@pytest.mark.parametrize(
    "fault",
    [
        marked("die", "engine dies"),
        marked("hang", "engine hangs"),
        marked("garbage", "engine gives garbage"),
        marked("stale", "weights in the engine are not the policy's"),
        marked("slow", "engine hangs"),
    ],
)
def test_an_engine_that_fails_once_changes_nothing(
    fault: Fault, tiny_model: Path, tmp_path: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "hang":
        monkeypatch.setattr(guard, "PATIENCE", 5.0)
    student = small.fit(tiny_model, tmp_path, epochs=2, engine=ChainEngine(faults={2: fault}))
    the_same(student, tmp_path, unbroken)


@pytest.mark.fault("engine dies")
@pytest.mark.parametrize("call", [2, 5], ids=["within an epoch", "at an epoch's first step"])
def test_an_engine_that_fails_twice_leaves_a_checkpoint_to_go_on_from(
    call: int, tiny_model: Path, tmp_path: Path, unbroken: Any
) -> None:
    engine = ChainEngine(faults={call: "die", call + 1: "die"})
    with pytest.raises(EngineFailed) as caught:
        small.fit(tiny_model, tmp_path, epochs=2, engine=engine)
    assert caught.value.exit_code == 75
    the_same(small.fit(tiny_model, tmp_path, epochs=2, goes_on=True), tmp_path, unbroken)


@pytest.mark.fault("empty, cut, endless rollouts")
@pytest.mark.parametrize("change", [{"faults": dict.fromkeys(range(20), "empty")}, {"slips": 0.0}], ids=str)
def test_steps_without_a_lesson_have_no_loss_and_move_nothing(
    change: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    fresh = small.weights(small.pair(tiny_model)[0])
    student = small.fit(tiny_model, tmp_path, epochs=1, engine=ChainEngine(**change))
    assert set(losses(tmp_path).values()) == {0.0}
    for name, value in small.weights(student).items():
        assert torch.equal(value, fresh[name]), name


@pytest.mark.fault("empty, cut, endless rollouts")
def test_rollouts_of_any_tokens_are_learned_from_or_left(
    tiny_model: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Half a character, NUL, special tokens, endless repetition: nothing that the vocabulary has is an error."""
    import random

    from ogls.lessons.selection import FirstTokens
    from tests.scripted import ScriptedEngine

    def noise(prompt: Any, rng: random.Random) -> list[int]:
        kind = rng.randrange(4)
        if kind == 0:
            return [rng.randrange(320)] * 1000
        return [rng.randrange(320 if kind == 1 else 260) for _ in range(rng.randrange(80))]

    student = small.fit(
        tiny_model,
        tmp_path,
        epochs=1,
        engine=ScriptedEngine(noise),
        selection=FirstTokens(8),
        locator=None,
        group_size=42,
    )
    assert all(torch.isfinite(value).all() for value in small.weights(student).values())
    record_property("tried", 42 * 3 * small.STEPS)
