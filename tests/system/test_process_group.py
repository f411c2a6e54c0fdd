"""Two processes on gloo make the steps that one makes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from ogls.callbacks.checkpoint_io import read_manifest
from ogls.system.process_group import ProcessGroup, combined
from ogls.system.step_metrics import StepMetrics
from ogls.tracking.files import METRICS, read_rows
from tests.faults.nursery import Nursery

SAMPLED = {  # diagnostics of some tokens of each micro-batch, of which each process has its own
    f"train/{name}"
    for name in (
        *("delta_range", "delta_std", "hoeffding_bound", "kl_target_anchor", "kl_target_student", "tv_target_anchor"),
        *("marker_mass_student", "marker_mass_target", "student_entropy", "target_entropy"),
    )
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rows(folder: Path) -> list[dict[str, float]]:
    return read_rows(folder / "small-s0-run" / METRICS)


def test_shares_cover_everything_once() -> None:
    items = list(range(7))
    shares = [ProcessGroup(rank, 3).share(items) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    alone = ProcessGroup()
    assert alone.joined(items) == alone.share(items) == items
    assert alone.summed([1.5, 2.0]) == [1.5, 2.0]
    assert alone.gathered("a") == ["a"]


def test_counts_add_up_and_rates_are_means_over_prompts() -> None:
    parts = [(3, {"lessons": 5, "accuracy": 0.5}), (1, {"lessons": 2, "accuracy": 0.25, "start": 0.5})]
    assert combined(parts) == {"lessons": 7.0, "accuracy": (3 * 0.5 + 0.25) / 4, "start": 0.5}
    first, second = StepMetrics("training", 1), StepMetrics("training", 1)
    for meter, values in ((first, [1.0, 2.0, 3.0]), (second, [6.0])):
        meter.add("loss_grpo", 0.5)
        meter.mean("kl", torch.tensor(values))
        with meter.time("student"):
            pass
    joined = StepMetrics.joined([first, second]).metrics()
    assert (joined["train/loss_grpo"], joined["train/kl"]) == (1.0, 3.0)
    seconds = [meter.metrics()["time/student"] for meter in (first, second)]
    assert joined["time/student"] == pytest.approx(sum(seconds) / 2)


@pytest.mark.fault("work shared by two processes")
def test_two_processes_are_one(
    nursery: Nursery,
    tiny_model: Path,
    tmp_path: Path,
    empty_database: Path,
    record_property: Callable[[str, object], None],
) -> None:
    alone, together, port = tmp_path / "alone", tmp_path / "together", free_port()
    for folder in (alone, together):
        folder.mkdir()
        shutil.copy(empty_database, folder)
    assert nursery.wait(nursery.fork("train_as", tiny_model, alone, 0, 1, port)) == 0
    both = [nursery.fork("train_as", tiny_model, together, rank, 2, port) for rank in (0, 1)]
    assert [nursery.wait(process) for process in both] == [0, 0]

    expected = load_file(alone / "weights-0.safetensors")
    first, second = (load_file(together / f"weights-{rank}.safetensors") for rank in (0, 1))
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
        assert torch.equal(first[name], second[name])
    gap = max(float((first[name] - value).abs().max()) for name, value in expected.items())
    record_property("figure", f"weights after 8 steps differ by {gap:.0e} from one process's")
    measured = {name for row in rows(alone) for name in row if name.startswith(("train/", "val/"))}
    assert {"train/loss_grpo", "train/loss_distillation", "train/tokens_learned", "train/accuracy"} <= measured
    for name in measured - SAMPLED:
        one, two = ({row["step"]: row[name] for row in rows(folder) if name in row} for folder in (alone, together))
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6), name
    (run,) = MlflowClient(f"sqlite:///{together}/mlflow.db").search_runs(["1"])
    assert (run.info.status, run.data.metrics["final/avg_at_2"]) == ("FINISHED", rows(alone)[-1]["final/avg_at_2"])
    assert sorted(path.name for path in together.iterdir() if path.is_dir()) == ["mlartifacts", "small-s0-run"]
    assert read_manifest(together / "small-s0-run/checkpoints/last.ckpt")["global_step"] == 8


def test_each_of_two_processes_has_an_engine_of_its_own(
    nursery: Nursery, tiny_model: Path, wide_model: Path, tmp_path: Path
) -> None:
    """In a process that knows nothing of the group; together they are one process, taught by another model."""
    alone, together, port = tmp_path / "alone", tmp_path / "together", free_port()
    for folder in (alone, together):
        folder.mkdir()
    both = [nursery.fork("sample_as", tiny_model, wide_model, together, "apart", rank, 2, port) for rank in (0, 1)]
    one = nursery.fork("sample_as", tiny_model, wide_model, alone, "apart", 0, 1, port)
    assert [nursery.wait(process) for process in (*both, one)] == [0, 0, 0]
    found = [json.loads(file.read_text()) for file in together.glob("engine-*.json")]
    assert {row["trainer"] for row in found} == {*both}
    assert all(row["group"] == [] and row["initialized"] is False for row in found)
    assert [file.name for file in alone.glob("engine-*.json")] == [f"engine-{one}.json"]
    expected = load_file(alone / "weights-0.safetensors")
    first, second = (load_file(together / f"weights-{rank}.safetensors") for rank in (0, 1))
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
        assert torch.equal(first[name], second[name])


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the extra cpu or cuda")
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_each_of_two_processes_has_a_vllm_of_its_own(
    strategy: str, nursery: Nursery, tiny_model: Path, wide_model: Path, tmp_path: Path
) -> None:
    """The canary compares it with the policy at every load, in each of the two."""
    port = free_port()
    both = [
        nursery.fork("sample_as", tiny_model, wide_model, tmp_path, "vllm", rank, 2, port, strategy) for rank in (0, 1)
    ]
    assert [nursery.wait(process) for process in both] == [0, 0]
    gaps = [row["train/engine_logprob_gap"] for row in rows(tmp_path) if "train/engine_logprob_gap" in row]
    assert len(gaps) == 2
    assert max(gaps) < 0.05
    first, second = (load_file(tmp_path / f"weights-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.fault("one of two processes is killed")
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_dies_the_other_ends(
    killed: int, nursery: Nursery, tiny_model: Path, tmp_path: Path, empty_database: Path
) -> None:
    shutil.copy(empty_database, tmp_path)
    port = free_port()
    deaths = [("3",) if rank == killed else () for rank in (0, 1)]
    both = [nursery.fork("train_as", tiny_model, tmp_path, rank, 2, port, *deaths[rank]) for rank in (0, 1)]
    assert nursery.wait(both[killed]) == -9
    start = time.monotonic()
    assert nursery.wait(both[1 - killed]) not in (0, -9)
    assert time.monotonic() - start < 60
    assert not Path(f"/proc/{both[1 - killed]}").exists()
    assert read_manifest(tmp_path / "small-s0-run/checkpoints/last.ckpt")["global_step"] in (2, 3)
    assert not any(name.startswith("weights") for name in os.listdir(tmp_path))


@pytest.mark.fault("SIGTERM, Ctrl-C")
def test_a_signal_to_one_process_stops_both_after_the_same_step(
    nursery: Nursery, tiny_model: Path, tmp_path: Path, empty_database: Path
) -> None:
    shutil.copy(empty_database, tmp_path)
    port = free_port()
    asked = ("1", str(int(signal.SIGTERM)))  # once the second process has made a step
    both = [nursery.fork("train_as", tiny_model, tmp_path, rank, 2, port, *(asked if rank else ())) for rank in (0, 1)]
    assert [nursery.wait(process) for process in both] == [143, 0]
    assert read_manifest(tmp_path / "small-s0-run/checkpoints/last.ckpt")["global_step"] == 2
    assert rows(tmp_path)[-1]["step"] == 2
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert run.info.status == "KILLED"
