"""What a step costs: by hand, and by the command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest
import steps
import torch


def test_the_first_step_does_not_count_nor_does_a_validation(tmp_path: Path):
    rows = [{"step": 0, "time": 0.0, "val/avg_at_1": 0.5}]
    rows += [{"step": n + 1, "time": end, "train/loss": 1.0} for n, end in enumerate((30.0, 32.0, 35.0, 36.0))]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert steps.seconds_between(file) == 2.0  # of 2, 3 and 1; 30 is the first


def test_ratios_are_within_a_round():
    told = steps.table(pd.DataFrame([{"opsd": 2.0, "sft": 1.0}, {"opsd": 10.0, "sft": 4.0}, {"opsd": 4.0, "sft": 1.2}]))
    assert told.loc["opsd"].tolist() == ["4.00 [2.00, 10.00]", "1.00 [1.00, 1.00]"]
    assert told.loc["sft"].tolist() == ["1.20 [1.00, 4.00]", "0.40 [0.30, 0.50]"]


@pytest.mark.parametrize(("option", "value", "got"), [("--steps", "1", "1 and 3"), ("--rounds", "0", "5 and 0")])
def test_what_cannot_be_measured_is_refused(option: str, value: str, got: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        steps.main(["--methods", "opsd", option, value])
    assert f"expected at least --steps 2 and --rounds 1, got {got}" in capsys.readouterr().err


def test_an_unknown_recipe_is_refused_before_the_first_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(steps, "measure", None)
    with pytest.raises(SystemExit):
        steps.main(["--methods", "nosuch"])
    assert "nosuch.yaml" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = ["--data.problems_per_step", "2", "--data.group_size", "2"]
    steps.main(["--methods", "sft", "--steps", "2", "--rounds", "1", "--args", *small])
    versions, processor, load, *_, heading, row = capsys.readouterr().out.splitlines()
    assert f", torch {torch.__version__}, " in versions
    assert "bf16" in processor
    assert load.startswith(f"threads 1 of {os.cpu_count()} CPUs, ")
    assert heading.split() == ["seconds", "a", "step", "ratio"]
    name, seconds, *_ = row.split()
    assert name == "sft"
    assert 0 < float(seconds) < 60
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["sft-steps.log"]
    with pytest.raises(SystemExit, match=r"a run ended with 2; its output: runs/logs/sft-steps\.log"):
        steps.main(["--methods", "sft", "--steps", "2", "--rounds", "1", "--args", "--policy.model", "absent"])
