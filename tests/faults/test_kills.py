"""What a killed run leaves behind, and what goes on from it, through the Python interface; see also test_campaigns."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ogls.callbacks.checkpoint_io import read_manifest
from ogls.tracking.files import METRICS, read_rows, write_rows
from tests.faults import small
from tests.faults.nursery import Nursery

LAST_STEP = small.EPOCHS * small.STEPS


def record(folder: Path) -> list[tuple[str, int, float]]:
    """Losses and accuracies by step: what a run has told."""
    rows = read_rows(folder / "small-s0-run" / METRICS)
    names = ("train/loss", "train/accuracy", "train/grad_norm", "val/avg_at_2")
    return sorted((name, row["step"], row[name]) for name in names for row in rows if name in row)


@pytest.fixture(scope="module")
def unbroken(nursery: Nursery, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert nursery.wait(nursery.fork("train", tiny_model, folder)) == 0
    return folder


def same(folder: Path, unbroken: Path) -> None:
    assert record(folder) == record(unbroken)
    assert [step for name, step, _ in record(folder) if name == "train/loss"] == list(range(1, LAST_STEP + 1))
    weights, expected = (load_file(place / "weights.safetensors") for place in (folder, unbroken))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_unbroken_run_is_that_of_the_golden_file(unbroken: Path) -> None:
    golden = json.loads(Path(__file__).with_name("golden.json").read_text())
    assert len(golden["train/loss"]) == LAST_STEP
    for name, values in golden.items():
        assert [value for metric, _, value in record(unbroken) if metric == name] == pytest.approx(values, rel=1e-4)


def test_a_checkpoint_holds_all_that_a_run_is(unbroken: Path) -> None:
    manifest = read_manifest(unbroken / "small-s0-run/checkpoints/last.ckpt")
    assert {"global_step": LAST_STEP, "policy_version": LAST_STEP, "seed": 0, "run": "small-s0-run"}.items() <= (
        manifest.items()
    )
    learned = {"state_dict", "optimizer_states", "lr_schedulers", "teacher"}
    assert learned | {"row", "config_sha256", "tokenizer_sha256", "mlflow_run_id"} <= set(manifest["holds"])


@pytest.mark.fault("kill -9 in the middle of a run")
def test_a_row_that_the_disk_has_lost_comes_from_the_checkpoint(
    nursery: Nursery, tiny_model: Path, tmp_path: Path, unbroken: Path
) -> None:
    """Where power fails, a checkpoint can be on the disk and the row before it not yet."""
    assert nursery.wait(nursery.fork("train", tiny_model, tmp_path, 6)) == -9
    file = tmp_path / "small-s0-run" / METRICS
    rows = read_rows(file)
    assert rows[-1]["step"] == 6
    assert "train/loss" in rows[-1]
    write_rows(file, rows[:-1])
    assert nursery.wait(nursery.fork("train", tiny_model, tmp_path)) == 0
    same(tmp_path, unbroken)


@pytest.mark.fault("checkpoint damaged: cut, bit flipped, empty, missing, foreign")
def test_going_on_from_a_damaged_checkpoint_takes_the_one_before(
    nursery: Nursery, tiny_model: Path, tmp_path: Path, unbroken: Path
) -> None:
    assert nursery.wait(nursery.fork("train", tiny_model, tmp_path, 6)) == -9
    last = tmp_path / "small-s0-run/checkpoints/last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    assert nursery.wait(nursery.fork("train", tiny_model, tmp_path)) == 0
    same(tmp_path, unbroken)


def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    rows = [{"step": 1, "time": 0.5, "train/loss": 2.0}, {"step": 2, "time": 0.5, "train/loss": 1.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / METRICS).write_text(text)
    assert read_rows(tmp_path / METRICS) == rows
    (tmp_path / METRICS).write_text(text[:-9])
    assert read_rows(tmp_path / METRICS) == rows[:1]
