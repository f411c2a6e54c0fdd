"""A study of real training runs: how they stand in MLflow, and whether the best configuration trains as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from optuna import Trial

from ogls.sweep import RunNumbers, Sweep, main, override
from tests.test_cli import RUN, small


def space(trial: Trial) -> dict[str, object]:
    alpha = trial.suggest_float("alpha", 0.0, 4.0)
    return {"method.steering": override("OutcomeSteering", alpha=alpha, ramp_steps=2)}


def objective(run: RunNumbers) -> float:
    return run.final_accuracy


@pytest.mark.slow
def test_runs_are_nested_and_the_best_configuration_trains(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sweep = Sweep(name="alpha", space=space, objective=objective, ladder={"alpha": [0.0, 1.5]})
    config, *further = small(tiny_model)[1:]
    with pytest.raises(SystemExit) as ended:
        main(sweep, ["--config", config, "--grid", "--", *further, "--trainer.max_epochs", "1"])
    assert ended.value.code == 0, [path.read_text()[-2000:] for path in Path().glob("runs/alpha/*/output.log")]

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("sweeps")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"alpha", "alpha-000-s0", "alpha-001-s0"}
    for number, alpha in enumerate([0.0, 1.5]):
        child = runs[f"alpha-{number:03d}-s0"]
        assert child.data.tags["mlflow.parentRunId"] == runs["alpha"].info.run_id
        assert (child.info.status, child.data.tags["outcome"]) == ("FINISHED", "COMPLETE")
        assert float(child.data.params["method.steering.alpha"]) == alpha
        assert f", alpha={alpha:g}, ramp_steps=2, " in child.data.tags["method"]
        assert child.data.params["trial"] == str(number)
        assert 0.0 <= child.data.metrics["final/avg_at_4"] <= 1.0

    command = [sys.executable, str(RUN), "fit", "--config", "runs/alpha/best.yaml"]
    trained = subprocess.run(command, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr[-3000:]
    best = max(runs.values(), key=lambda run: run.data.metrics.get("final/avg_at_4", -1.0))
    again = RunNumbers(next(path for path in Path("runs").glob("*-s0-*/metrics.jsonl"))).update()
    assert again.last("final/avg_at_4") == best.data.metrics["final/avg_at_4"], "the same run again"
    (alone,) = client.search_runs(
        ["1", "2"], "tags.method LIKE 'OGLS_SD[%'", order_by=["start_time DESC"], max_results=1
    )
    assert "mlflow.parentRunId" not in alone.data.tags
