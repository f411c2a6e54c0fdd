"""kill -9 at any moment: what goes on is bitwise the run that was never killed."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ogls.callbacks.checkpoint_io import read_manifest
from ogls.tracking.files import METRICS, read_rows
from tests.faults import small
from tests.faults.nursery import Nursery

LAST_STEP = small.EPOCHS * small.STEPS


def record(folder: Path) -> list[tuple[str, int, float]]:
    """Losses and accuracies by step: what a run has told."""
    rows = read_rows(folder / "small-s0-run" / METRICS)
    names = ("train/loss", "train/accuracy", "train/grad_norm", "val/avg_at_2")
    return sorted((name, row["step"], row[name]) for name in names for row in rows if name in row)


def progress(process: int) -> tuple[bool, float]:
    """Whether a process has ended, and its seconds of processor time, which a busy machine does not change."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0] == "Z", (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def unbroken(nursery: Nursery, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Folder and processor time of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    process = nursery.fork("train", tiny_model, folder)
    while not progress(process)[0]:
        time.sleep(0.05)
    seconds = progress(process)[1]
    assert nursery.wait(process) == 0
    return folder, seconds


def survive(kills: int, nursery: Nursery, model: Path, folder: Path, unbroken: tuple[Path, float]) -> None:
    rng, killed, done = random.Random(kills), 0, 0
    while killed < kills:
        process = nursery.fork("train", model, folder)
        moment = unbroken[1] * rng.random()
        while progress(process) < (False, moment):
            time.sleep(0.005)
        os.kill(process, 9)
        if nursery.wait(process) == 0:  # it was quicker: begin anew
            done += 1
            same(folder, unbroken[0])
            (folder / "small-s0-run").rename(folder / f"done-{done}")
        else:
            killed += 1
    assert nursery.wait(nursery.fork("train", model, folder)) == 0
    same(folder, unbroken[0])


def same(folder: Path, unbroken: Path) -> None:
    assert record(folder) == record(unbroken)
    assert [step for name, step, _ in record(folder) if name == "train/loss"] == list(range(1, LAST_STEP + 1))
    weights, expected = (load_file(place / "weights.safetensors") for place in (folder, unbroken))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.fault("kill -9 in the middle of a run")
@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(5, marks=pytest.mark.slow),
        pytest.param(200, marks=[pytest.mark.torture, pytest.mark.timeout(7200)]),
    ],
)
def test_killed_runs_end_bitwise_where_the_unbroken_one_ends(
    kills: int,
    nursery: Nursery,
    tiny_model: Path,
    tmp_path: Path,
    unbroken: tuple[Path, float],
    record_property: Callable[[str, object], None],
) -> None:
    survive(kills, nursery, tiny_model, tmp_path, unbroken)
    record_property("tried", kills)
    record_property("figure", f"{kills} kills: losses, gradient norms, accuracies and weights differ by 0")


def test_the_unbroken_run_is_that_of_the_golden_file(unbroken: tuple[Path, float]) -> None:
    golden = json.loads(Path(__file__).with_name("golden.json").read_text())
    assert len(golden["train/loss"]) == LAST_STEP
    for name, values in golden.items():
        assert [value for metric, _, value in record(unbroken[0]) if metric == name] == pytest.approx(values, rel=1e-4)


def test_a_checkpoint_holds_all_that_a_run_is(unbroken: tuple[Path, float]) -> None:
    manifest = read_manifest(unbroken[0] / "small-s0-run/checkpoints/last.ckpt")
    assert {"global_step": LAST_STEP, "policy_version": LAST_STEP, "seed": 0, "run": "small-s0-run"}.items() <= (
        manifest.items()
    )
    learned = {"state_dict", "optimizer_states", "lr_schedulers", "teacher"}
    assert learned | {"row", "config_sha256", "tokenizer_sha256", "mlflow_run_id"} <= set(manifest["holds"])


@pytest.mark.fault("kill -9 in the middle of a run")
def test_a_kill_between_checkpoint_and_log_loses_no_row(
    nursery: Nursery, tiny_model: Path, tmp_path: Path, unbroken: tuple[Path, float]
) -> None:
    """Lightning writes the row of a step after the checkpoint of that step."""
    assert nursery.wait(nursery.fork("train", tiny_model, tmp_path, 6)) == -9
    rows = read_rows(tmp_path / "small-s0-run" / METRICS)
    assert max(row["step"] for row in rows if "train/loss" in row) == 5
    assert nursery.wait(nursery.fork("train", tiny_model, tmp_path)) == 0
    same(tmp_path, unbroken[0])


@pytest.mark.fault("checkpoint damaged: cut, bit flipped, empty, missing, foreign")
def test_going_on_from_a_damaged_checkpoint_takes_the_one_before(
    nursery: Nursery, tiny_model: Path, tmp_path: Path, unbroken: tuple[Path, float]
) -> None:
    assert nursery.wait(nursery.fork("train", tiny_model, tmp_path, 6)) == -9
    last = tmp_path / "small-s0-run/checkpoints/last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    assert nursery.wait(nursery.fork("train", tiny_model, tmp_path)) == 0
    same(tmp_path, unbroken[0])


def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    rows = [{"step": 1, "time": 0.5, "train/loss": 2.0}, {"step": 2, "time": 0.5, "train/loss": 1.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / METRICS).write_text(text)
    assert read_rows(tmp_path / METRICS) == rows
    (tmp_path / METRICS).write_text(text[:-9])
    assert read_rows(tmp_path / METRICS) == rows[:1]
