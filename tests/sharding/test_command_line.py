"""`--trainer.strategy sharded` on the command line: the record, the checkpoints and the export of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ogls.callbacks.best import ADAPTER
from tests.faults.arena import _free_port, _launched
from tests.faults.nursery import Nursery
from tests.faults.test_resume import ENVIRONMENT, carried_out, fit, run_in, told, weights

SHARDED = ("--trainer.strategy", "sharded", "--trainer.devices", "2")


def arguments(model: Path, *further: str) -> list[str]:
    """A run of two epochs of one step each."""
    return fit(
        model,
        *("--data.verifier", "tests.faults.boxed.Boxed", "--data.steps_per_epoch", "1", "--trainer.max_epochs", "2"),
        *("--model.learning_rate", "1e-5", "--data.engine", "tests.scripted.PeakingEngine", *further),
    )


def by_two(nursery: Nursery, folder: Path, *args: str) -> None:
    """A run by two processes, as torchrun starts them."""
    port, forked = _free_port(), []
    for rank in range(2):
        environment = json.dumps(ENVIRONMENT | _launched(rank, 2, port))
        forked.append(nursery.fork("run", folder, folder / f"output-{rank}.txt", environment, *args, *SHARDED))
    codes = [nursery.wait(process) for process in forked]
    said = "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("output-*.txt")))
    assert codes == [0, 0], said


def compared(folder: Path) -> list[tuple[str, int, float]]:
    """All figures but those of samples of each micro-batch's tokens (`ogls.loss.diagnostics`)."""
    exact = ("train/loss", "train/grad_norm", "train/accuracy", "train/skipped", "val", "final")
    return [figure for figure in told(folder) if figure[0].startswith(exact)]


def alike(folder: Path, expected: Path) -> None:
    assert len(compared(expected)) > 20
    for (name, step, value), wanted in zip(compared(folder), compared(expected), strict=True):
        assert (name, step) == wanted[:2]
        assert value == pytest.approx(wanted[2], rel=1e-5, abs=1e-6), (name, step)
    ours, theirs = weights(folder), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)


def adapter(folder: Path) -> Path:
    return run_in(folder) / ADAPTER / "adapter_model.safetensors"


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "all weights"])
def test_two_processes_leave_what_one_leaves(lora: bool, nursery: Nursery, tiny_model: Path, tmp_path: Path) -> None:
    """Figures of every step and validation, checkpoints, the best adapter, and the exported model."""
    args = arguments(tiny_model, *(() if lora else ("--policy.lora", "null")))
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    code, output = carried_out(nursery, one, *args)
    assert code == 0, output[-3000:]
    by_two(nursery, two, *args)
    alike(two, one)
    assert adapter(two).exists() == lora
    ours, theirs = (load_file(f) for f in (adapter(two), adapter(one))) if lora else ({}, {})
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)
    for folder in (one, two):
        saved = str(run_in(folder) / "checkpoints/last.ckpt")
        code, output = carried_out(nursery, folder, "export", "--ckpt_path", saved, "--to", "out", "--dtype", "float32")
        assert code == 0, output[-3000:]
    ours, theirs = (load_file(folder / "out/model.safetensors") for folder in (two, one))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)


def test_one_process_goes_on_with_a_run_of_two_and_two_with_that_of_one(
    nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    short, long = arguments(tiny_model), arguments(tiny_model, "--trainer.max_epochs", "4")
    folders = [tmp_path / name for name in ("one", "one-two", "two-one")]
    for folder in folders:
        folder.mkdir()
    last = ("--ckpt_path", "last", "--allow_changes")
    for folder in folders[:2]:
        assert carried_out(nursery, folder, *short)[0] == 0
    by_two(nursery, folders[2], *short)
    assert carried_out(nursery, folders[0], *long, *last)[0] == 0
    by_two(nursery, folders[1], *long, *last)
    assert carried_out(nursery, folders[2], *long, *last)[0] == 0
    alike(folders[1], folders[0])
    alike(folders[2], folders[0])


def test_an_engine_that_samples_with_the_policy_itself_is_refused(
    nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    engine = ("--data.engine", "TransformersEngine", "--trainer.strategy", "sharded", "--trainer.devices", "1")
    code, output = carried_out(nursery, tmp_path, *arguments(tiny_model, *engine))
    assert code == 2, output[-3000:]
    assert "TransformersEngine samples with the policy itself" in output
    assert "Traceback" not in output
