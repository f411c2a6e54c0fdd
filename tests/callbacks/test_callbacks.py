"""How a run ends and goes on, and what a person sees of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from tiny import STEPS, Tiny, TinyData, trainer

from ogls.callbacks import StepProgress
from ogls.callbacks.checkpoint_io import read_manifest, write
from ogls.callbacks.progress import phases
from ogls.system.exits import DiskFailed
from ogls.tracking import Tracker
from ogls.tracking.files import read_trace
from tests.faults.nursery import Nursery


@pytest.fixture(autouse=True)
def place(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with an empty database, and the signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def client() -> MlflowClient:
    return MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")


def trace() -> list[tuple[int, str]]:
    (folder,) = Path("runs").iterdir()
    return [(phase.step, phase.name) for phase in read_trace(folder / "trace.json")]


def runs() -> list[Run]:
    return client().search_runs([e.experiment_id for e in client().search_experiments()])


def rows() -> list[dict[str, float]]:
    (folder,) = Path("runs").iterdir()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.fault("SIGTERM, Ctrl-C")
def test_sigterm_then_going_on_is_one_unbroken_run() -> None:
    stopped = Tiny(during={2: lambda: signal.raise_signal(signal.SIGTERM)})
    with pytest.raises(SystemExit) as caught:
        trainer(2, system_metrics=False).fit(stopped, TinyData())
    assert caught.value.code == 143
    assert [run.info.status for run in runs()] == ["KILLED"]
    assert [row["step"] for row in rows()] == [1, 2]
    (folder,) = Path("runs").iterdir()
    with (folder / "trace.json").open("a") as file:  # what a kill in the third step may leave
        file.write(
            '{"ph": "X", "name": "student", "pid": 0, "tid": 1, "ts": 1, "dur": 1, "args": {"step": 3}},\n{"ph": "X"'
        )

    model = Tiny()
    trainer(2, system_metrics=False).fit(model, TinyData(), ckpt_path="last")
    assert model.policy.weight.item() == sum(range(1, 2 * STEPS + 1))  # no step skipped, none made twice
    (run,) = runs()
    assert run.info.status == "FINISHED"
    history = client().get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, 2 * STEPS + 1))
    assert [row["step"] for row in rows() if "train/loss" in row] == list(range(1, 2 * STEPS + 1))
    assert [step for step, phase in trace() if phase == "student"] == list(range(1, 2 * STEPS + 1))
    assert [step for step, phase in trace() if phase == "validate"] == [STEPS, 2 * STEPS]
    events = json.loads((folder / "trace.json").read_text().removesuffix(",\n") + "]")  # the format's own closing
    assert {event["tid"] for event in events} == {0, 1}
    assert [row["step"] for row in rows() if "val/avg_at_4" in row] == [STEPS, 2 * STEPS]
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["row"]
    assert saved == {"train/loss": 1 / (2 * STEPS), "train/accuracy": 0.5, "time/student": 0.1}, "of its step alone"


@pytest.mark.fault("SIGTERM, Ctrl-C")
def test_ctrl_c_makes_the_validation_that_is_due(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = Tiny(during={STEPS: lambda: signal.raise_signal(signal.SIGINT)})
    with pytest.raises(SystemExit) as caught:
        trainer(2, system_metrics=False).fit(stopped, TinyData())
    assert caught.value.code == 130
    assert [row["step"] for row in rows() if "val/avg_at_4" in row] == [STEPS]
    assert "--ckpt_path last" in capsys.readouterr().err

    model = Tiny()
    trainer(2, system_metrics=False).fit(model, TinyData(), ckpt_path="last")
    assert model.policy.weight.item() == sum(range(1, 2 * STEPS + 1))
    assert [row["step"] for row in rows() if "val/avg_at_4" in row] == [STEPS, 2 * STEPS]


@pytest.mark.fault("SIGTERM, Ctrl-C")
def test_ctrl_c_in_the_last_step_ends_a_complete_run() -> None:
    trainer(1, system_metrics=False).fit(Tiny(during={STEPS: lambda: signal.raise_signal(signal.SIGINT)}), TinyData())
    assert [run.info.status for run in runs()] == ["FINISHED"]
    assert [row["step"] for row in rows() if "val/avg_at_4" in row] == [STEPS]


@pytest.mark.fault("SIGTERM, Ctrl-C")
def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exit(BaseException):
        pass

    def leave(code: int) -> None:
        raise Exit(code)

    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(os, "_exit", leave)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Exit, match="130"):
        trainer(1, system_metrics=False).fit(Tiny(during={2: twice}), TinyData())


def test_a_run_that_has_no_step_left_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(1, system_metrics=False).fit(Tiny(), TinyData())
    assert "No step was left" not in capsys.readouterr().out
    trainer(1, system_metrics=False).fit(Tiny(), TinyData(), ckpt_path="last")
    assert "No step was left to make: trainer.max_epochs is 1" in capsys.readouterr().out


def test_after_a_run_ctrl_c_is_what_it_was() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    trainer(1, system_metrics=False).fit(Tiny(), TinyData())
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_an_error_ends_the_run_as_failed() -> None:
    def fail() -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(1, system_metrics=False).fit(Tiny(during={2: fail}), TinyData())
    assert [run.info.status for run in runs()] == ["FAILED"]


@pytest.mark.fault("SIGTERM, Ctrl-C")
def test_exit_code_of_a_process(nursery: Nursery, place: Path) -> None:
    process = nursery.fork("train_until_told", place)
    while not (place / "stepping").exists():
        time.sleep(0.01)
    os.kill(process, signal.SIGTERM)
    (place / "told").touch()
    assert nursery.wait(process) == 143
    assert [row["step"] for row in rows()] == [1, 2]
    assert [run.info.status for run in runs()] == ["KILLED"]


@pytest.mark.fault("disk full while a checkpoint is written")
def test_a_full_disk_is_a_metric_and_the_third_time_in_a_row_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    failing = Tiny(during={2: lambda: monkeypatch.setattr(os, "fsync", full)})
    with pytest.raises(DiskFailed) as caught:
        trainer(2, system_metrics=False).fit(failing, TinyData())
    assert caught.value.exit_code == 74
    failed = [(row["step"], row["train/checkpoints_failed"]) for row in rows() if "train/checkpoints_failed" in row]
    assert failed == [(2, 1), (3, 2)]
    (folder,) = Path("runs").iterdir()
    assert read_manifest(folder / "checkpoints/last.ckpt")["global_step"] == 1


@pytest.mark.fault("disk full")
def test_no_room_for_the_best_adapter_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tiny = Tiny()
    tiny.policy.save_adapter = full
    trainer(1, system_metrics=False).fit(tiny, TinyData())
    assert tiny.trainer.global_step == STEPS
    assert "best_adapter keeps what it had: [Errno 28]" in capsys.readouterr().err


def test_the_best_of_all_weights_is_written_whole_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    def save(folder: Path, weights: dict[str, Any]) -> None:
        (folder / "weight.txt").write_text(str(weights["weight"].item()))

    def full(folder: Path, weights: dict[str, Any]) -> None:
        save(folder, weights)
        raise OSError(errno.ENOSPC, "No space left on device")

    for epochs, saving, wanted in ((1, full, None), (1, save, 10.0), (2, full, 10.0), (2, save, 36.0)):
        tiny = Tiny()
        tiny.policy.lora, tiny.policy.save_model = None, saving
        going_on = "last" if list(Path("runs").glob("*")) else None
        trainer(epochs, system_metrics=False).fit(tiny, TinyData(), ckpt_path=going_on)
        (run,) = Path("runs").iterdir()
        assert not (run / ".best_model.draft").exists()
        assert ("best_model is not written: [Errno 28]" in capsys.readouterr().err) == (saving is full)
        assert (float((run / "best_model/weight.txt").read_text()) if wanted else None) == wanted
        assert (run / "best_model").exists() == (wanted is not None)
        (run / ".best_model.draft").mkdir()  # as a kill leaves it
        (run / ".best_model.draft" / "part").touch()


def test_last_is_an_error_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"there is no .*tiny-s7-"):
        trainer(1).fit(Tiny(), TinyData(seed=7), ckpt_path="last")


def test_last_is_of_the_same_method_and_seed() -> None:
    for run in ("tiny-s0-1", "tiny-s1-1", "other-s0-1", "tiny-selection-ErrorSpan-s1-1", "run-s1-1"):
        folder = Path("runs") / run / "checkpoints"
        write({"global_step": 1}, folder / "last.ckpt")
    made = trainer(1)
    assert isinstance(made.logger, Tracker)
    made.logger.describe("tiny", 1)
    checkpoint = made.checkpoint_callback
    assert checkpoint is not None
    assert checkpoint._find_last_checkpoints(made) == {"runs/tiny-s1-1/checkpoints/last.ckpt"}
    made.logger.describe("tiny[selection=ErrorSpan]", 1)
    assert checkpoint._find_last_checkpoints(made) == {"runs/tiny-selection-ErrorSpan-s1-1/checkpoints/last.ckpt"}


def test_lines_of_progress() -> None:
    assert phases({"time/student": 1.26, "time/generate": 4.0, "time/total": 9.0}) == "generate 4.0 + student 1.3"


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(1, system_metrics=False)
    assert isinstance(made.progress_bar_callback, StepProgress)
    made.fit(Tiny(), TinyData())
    printed = capsys.readouterr().out
    assert f"step {STEPS}/{STEPS}  loss 0.25  accuracy 0.5" in printed
    assert "left 0:00:00" in printed
    assert f"after step {STEPS}: val/avg_at_4 0.500" in printed
    assert "\x1b" not in printed
