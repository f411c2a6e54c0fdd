"""Tables of train set, test set and method from runs whose numbers are known; nothing is trained."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matrix
import numpy as np
import pytest
import seeds
from mlflow import MlflowClient
from mlflow.entities import Metric
from recipes import recipes

from ogls.system.statistics import share_interval

BEFORE = {"sums/a": 0.2, "sums/b": 0.4, "words/a": 0.5, "words/b": 0.5}


def after(sums: float, words: float, seed: int) -> dict[str, float]:
    """Seed 1 has 0.01 more, seed 2 has 0.01 less; problem b gains as much as problem a."""
    noise = (0.0, 0.01, -0.01)[seed]
    return {name: BEFORE[name] + (sums if name.startswith("sums") else words) + noise for name in BEFORE}


def test_changes_are_judged_by_set_and_corrected_for_all_of_the_table() -> None:
    cells = {("sums", "OPSD"): ([BEFORE] * 3, [after(0.3, 0.0, seed) for seed in range(3)])}
    table = matrix.tabulate(cells).set_index("test")
    sums = seeds.difference(np.array([[0.3, 0.3], [0.31, 0.31], [0.29, 0.29]]))
    assert (table.loc["sums", "before"], table.loc["sums", "after"]) == pytest.approx((0.3, 0.6))
    assert (table.loc["sums", "change"], table.loc["sums", "change ±"]) == pytest.approx((0.3, sums.half))
    assert table.loc["sums", "p, Holm"] == pytest.approx(2 * sums.p_value)
    assert table.loc["words", "change"] == pytest.approx(0.0)
    accuracy, change = matrix.matrices(table.reset_index()).split("\n\n")
    assert accuracy.splitlines()[0] == "| accuracy after training on | method | sums | words |"
    assert change.splitlines()[2] == f"| sums | OPSD | +0.300 ± {sums.half:.3f} * | +0.000 ± {sums.half:.3f} |"


def test_few_seeds_are_judged_over_problems_alone() -> None:
    table = matrix.tabulate({("sums", "OPSD"): ([BEFORE], [BEFORE | {"sums/a": 0.4, "sums/b": 0.8}])})
    row = table.set_index("test").loc["sums"]
    # Changes of 0.2 and 0.4: t(0.975, 1) = 12.706, times 0.1414 / sqrt 2.
    assert row["change ±"] == pytest.approx(1.2706, abs=1e-3)
    assert math.isnan(row["p, Holm"])
    _, low, high = share_interval([0.4, 0.8])
    assert row["after ±"] == pytest.approx(max(high - 0.6, 0.6 - low))
    assert "*" not in matrix.matrices(table)


def test_problems_without_a_set_are_refused() -> None:
    with pytest.raises(ValueError, match="the runs have a single evaluation set: name several"):
        matrix.tabulate({("sums", "OPSD"): ([{"a": 0.2}], [{"a": 0.3}])})


def test_runs_of_every_train_set_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["matrix.py"])
    data = "data:\n  {}: {{{}class_path: Chains, init_args: {{size: 4{}}}}}{}\n"
    Path("short.yaml").write_text(data.format("train", "", "", ""))
    Path("long.yaml").write_text(data.format("train", "", ", max_steps: 4", ""))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("lab", artifact_location=str(tmp_path / "artifacts"))
    made = recipes("lab.yaml", ["opsd+short", "opsd+long"])
    for gain, recipe in zip((0.3, 0.1), made.values(), strict=True):
        for seed in range(3):
            tags = {"method": recipe.name, "seed": str(seed), "recipe": recipe.digest}
            run = client.create_run(experiment, tags=tags).info.run_id
            client.log_batch(
                run,
                metrics=[Metric(f"val/{name}avg_at_100", 0.4, 0, step) for name in ("", "sums/") for step in (0, 10)],
            )
            client.log_dict(run, BEFORE, "problems/step-000000.json")
            client.log_dict(run, after(gain, 0.0, seed), "problems/step-000010.json")
            client.set_terminated(run, "FINISHED")
    where = ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", "--out", "table"]
    matrix.main(["--methods", "opsd", "--train", "short", "long", "--seeds", "3", *where])
    lines = Path("table.md").read_text().splitlines()
    assert lines[2].startswith("| short | OPSD | 0.600 ± ")
    assert lines[3].startswith("| long | OPSD | 0.400 ± ")
    assert "| short | OPSD | +0.300 ±" in lines[7]
    assert len(Path("table.csv").read_text().splitlines()) == 1 + 2 * 2
