"""A resume belongs to its run: what goes on, from where, as what; all through the command line."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ogls.callbacks.checkpoint_io import newest_sound, read_manifest, write
from ogls.tracking.files import CONFIG, METRICS, TRACE, read_rows, read_trace
from tests.faults.nursery import Nursery

STEPS, EPOCHS = 4, 3
LAST = STEPS * EPOCHS
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def fit(model: Path, *further: str) -> list[str]:
    """A run of seconds in which everything is real but the engine; it saves every third step."""
    return [
        *("fit", "--config", "math.yaml", "--policy.model", str(model), "--policy.adapter", "null"),
        *("--policy.dtype", "float32", "--data.engine", "tests.scripted.ChainEngine"),
        *("--data.train.size", "30", "--data.val.size", "4", "--data.problems_per_step", "3"),
        *("--data.steps_per_epoch", str(STEPS), "--trainer.max_epochs", str(EPOCHS), "--trainer.accelerator", "cpu"),
        *("--trainer.callbacks.init_args.save_every", "3", "--data.context_length", "300"),
        *("--trainer.logger.init_args.system_metrics", "false", "--trainer.logger.init_args.traces", "1"),
        *("--trainer.logger.init_args.tracking_uri", "http://127.0.0.1:9", *further),
    ]


def start(nursery: Nursery, folder: Path, *args: str) -> int:
    return nursery.fork("run", folder, folder / "output.txt", json.dumps(ENVIRONMENT), *args)


def carried_out(nursery: Nursery, folder: Path, *args: str) -> tuple[int, str]:
    return nursery.run(folder, ENVIRONMENT, *args)


def run_in(folder: Path) -> Path:
    """The only run's folder: whatever was killed, nothing else was begun."""
    (run,) = (folder / "runs").iterdir()
    return run


def told(folder: Path) -> list[tuple[str, int, float]]:
    """Every figure by step that no clock says."""
    rows = read_rows(run_in(folder) / METRICS)
    names = {name for row in rows for name in row if name.startswith(("train/", "val/", "val_subset/", "final/"))}
    return sorted((name, row["step"], row[name]) for name in names for row in rows if name in row)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_in(folder) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def same(folder: Path, unbroken: Path) -> None:
    assert told(folder) == told(unbroken)
    expected = weights(unbroken)
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())
    steps = [phase.step for phase in read_trace(run_in(folder) / TRACE) if phase.name == "optimizer"]
    assert steps == list(range(1, LAST + 1))


@pytest.fixture(scope="module")
def unbroken(nursery: Nursery, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    code, output = carried_out(nursery, folder, *fit(tiny_model))
    assert code == 0, output[-3000:]
    rows = read_rows(run_in(folder) / METRICS)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, LAST + 1))
    assert sum("final/avg_at_4" in row for row in rows) == 1
    assert [row["step"] for row in rows if "val/avg_at_4" in row] == [0, LAST]
    assert [row["step"] for row in rows if "val_subset/avg_at_4" in row] == [0, STEPS, 2 * STEPS, LAST]
    return folder


@pytest.mark.fault("kill -9 at the very end of a run")
@pytest.mark.parametrize("moment", ["on_train_end", "on_fit_end", "teardown"])
def test_a_run_that_was_killed_at_its_end_has_every_row_once(
    moment: str, nursery: Nursery, tiny_model: Path, tmp_path: Path, unbroken: Path
) -> None:
    killer = ("--trainer.callbacks+", "tests.faults.victims.KilledIn", "--trainer.callbacks.init_args.moment", moment)
    code, _ = carried_out(nursery, tmp_path, *fit(tiny_model), *killer)
    assert code == -9
    code, output = carried_out(nursery, tmp_path, *fit(tiny_model, "--ckpt_path", "last"))
    assert code == 0, output[-3000:]
    assert f"at step {LAST}" in output
    same(tmp_path, unbroken)


@pytest.fixture
def stopped(nursery: Nursery, tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with a run of one epoch of the same settings."""
    code, output = carried_out(nursery, tmp_path, *fit(tiny_model, "--trainer.max_epochs", "1"))
    assert code == 0, output[-3000:]
    return tmp_path


@pytest.mark.fault("a resume takes another run, or another configuration")
def test_what_is_not_the_run_is_refused_by_name(nursery: Nursery, tiny_model: Path, stopped: Path) -> None:
    before = {path: path.read_bytes() for path in run_in(stopped).rglob("*") if path.is_file()}
    name = ("--trainer.logger.init_args.run_name", run_in(stopped).name, "--ckpt_path", "last")
    for changed, said in {
        ("--method.steering.alpha", "2"): "method.steering.alpha: 1.0 there, 2.0 here",
        ("--model.learning_rate", "0.1"): "model.learning_rate: 0.0005 there, 0.1 here",
        ("--data.train.seed", "9"): "data.train.seed: 0 there, 9 here",
        ("--data.steps_per_epoch", "5"): "data.steps_per_epoch: 4 there, 5 here",
        ("--method", "OPSD"): "method: OGLS_SD there, OPSD here",
    }.items():
        code, output = carried_out(nursery, stopped, *fit(tiny_model), *changed, *name)
        assert (code, said in output) == (2, True), output[-2000:]
        assert "--allow_changes" in output
    assert before == {path: path.read_bytes() for path in run_in(stopped).rglob("*") if path.is_file()}


@pytest.mark.fault("a resume takes another run, or another configuration")
def test_last_never_takes_a_run_of_another_method_or_seed(nursery: Nursery, tiny_model: Path, stopped: Path) -> None:
    for changed in (("--method", "OPSD", "--method.selection", "ErrorSpan"), ("--seed_everything", "1")):
        code, output = carried_out(nursery, stopped, *fit(tiny_model), *changed, "--ckpt_path", "last")
        assert (code, "there is no run" in output) == (2, True), output[-2000:]


def test_a_change_that_is_allowed_is_applied_and_recorded(nursery: Nursery, tiny_model: Path, stopped: Path) -> None:
    first = (run_in(stopped) / CONFIG).read_text()
    changed = ("--model.learning_rate", "0.003", "--model.schedule", "constant", "--allow_changes")
    code, output = carried_out(nursery, stopped, *fit(tiny_model), *changed, "--ckpt_path", "last")
    assert code == 0, output[-3000:]
    assert f"Going on with {run_in(stopped).name} at step {STEPS}: model.learning_rate: 0.0005 there" in output
    rates = {
        row["step"]: row["train/learning_rate"] for row in read_rows(run_in(stopped) / METRICS) if "train/loss" in row
    }
    assert rates[STEPS] < 0.0006
    assert [rates[step] for step in range(STEPS + 1, LAST + 1)] == pytest.approx([0.003] * (LAST - STEPS))
    assert (run_in(stopped) / CONFIG).read_text() == first
    assert yaml.safe_load((run_in(stopped) / f"config-step{STEPS}.yaml").read_text())["model"]["learning_rate"] == 0.003


def test_a_second_run_does_not_write_into_a_used_folder(nursery: Nursery, tiny_model: Path, stopped: Path) -> None:
    rows = (run_in(stopped) / METRICS).read_bytes()
    name = ("--trainer.logger.init_args.run_name", run_in(stopped).name)
    code, output = carried_out(nursery, stopped, *fit(tiny_model), *name)
    assert (code, "has a run already: go on with it by --ckpt_path last" in output) == (2, True), output[-2000:]
    assert (run_in(stopped) / METRICS).read_bytes() == rows


def test_the_checkpoint_that_is_furthest_on_counts_whatever_the_clock_says(tmp_path: Path) -> None:
    for name, step, seconds in (("last.ckpt", 7, 100), ("previous.ckpt", 4, 300), ("best.ckpt", 7, 50)):
        write({"global_step": step}, tmp_path / name)
        os.utime(tmp_path / name, (seconds, seconds))
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert newest_sound(paths) == tmp_path / "last.ckpt"
    os.truncate(tmp_path / "last.ckpt", 100)
    assert newest_sound(paths) == tmp_path / "best.ckpt"
    assert read_manifest(tmp_path / "best.ckpt")["global_step"] == 7


@pytest.mark.fault("a resume takes another run, or another configuration")
def test_other_base_weights_under_the_same_name_are_refused(nursery: Nursery, tiny_model: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    code, output = carried_out(nursery, tmp_path, *fit(own, "--trainer.max_epochs", "1"))
    assert code == 0, output[-3000:]
    file = own / "model.safetensors"
    save_file({name: w * 1.01 for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    code, output = carried_out(nursery, tmp_path, *fit(own, "--ckpt_path", "last"))
    assert (code, "was trained on other base weights" in output) == (2, True), output[-2000:]


@pytest.mark.fault("metrics.jsonl or trace.json damaged in the middle")
def test_damaged_side_files_do_not_stop_a_resume(nursery: Nursery, tiny_model: Path, stopped: Path) -> None:
    damaged = {}
    for name in (METRICS, TRACE):
        file = run_in(stopped) / name
        lines = file.read_bytes().split(b"\n")
        lines[3] = lines[3][:10] + b"\x00\xff" + lines[3][10:20]
        file.write_bytes(b"\n".join(lines))
        damaged[name] = file.read_bytes()
    code, output = carried_out(nursery, stopped, *fit(tiny_model, "--ckpt_path", "last"))
    assert code == 0, output[-3000:]
    for name, before in damaged.items():
        assert f"{name}: a line cannot be read and will be left out" in output
        assert (run_in(stopped) / f"{name}.damaged").read_bytes() == before
    rows = read_rows(run_in(stopped) / METRICS)
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert len(steps) >= LAST - 1
    assert steps == sorted(set(steps))
    assert steps[-1] == LAST
    assert all(phase.step <= LAST for phase in read_trace(run_in(stopped) / TRACE))


@pytest.mark.fault("full disk, read-only folder")
def test_a_full_disk_ends_the_run_with_74(nursery: Nursery, tiny_model: Path, tmp_path: Path) -> None:
    process = start(nursery, tmp_path, *fit(tiny_model))
    resource.prlimit(process, resource.RLIMIT_FSIZE, (4000, 4000))  # bytes per file: a checkpoint needs more
    code, output = nursery.wait(process), (tmp_path / "output.txt").read_text()
    assert code == 74, output
    assert "File too large" in output
    assert "Traceback" not in output


@pytest.mark.fault("full disk, read-only folder")
def test_a_folder_that_may_not_be_written_to_ends_the_run_with_74(
    nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    place = ("--trainer.logger.init_args.folder", "/sys/ogls")  # nobody makes folders there
    code, output = carried_out(nursery, tmp_path, *fit(tiny_model, *place))
    assert code == 74, output
    assert "error: /sys/ogls: " in output
    assert "make room or choose another place" in output
    assert "Traceback" not in output
