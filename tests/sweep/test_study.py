"""Whole studies, of runs that take milliseconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
from mlflow import MlflowClient
from optuna import Trial
from optuna.artifacts import get_all_artifact_meta
from optuna.trial import TrialState

from ogls.sweep import RunNumbers, Sweep, main
from ogls.sweep.budget import Cost, pruner, spent_hours

STUB = Path(__file__).with_name("stub.py")


def space(trial: Trial) -> dict[str, object]:
    return {"x": trial.suggest_float("x", 0.0, 1.0), "does": trial.suggest_categorical("does", DOES)}


def objective(run: RunNumbers) -> float:
    return run.final_accuracy


DOES = ["fine", "raise", "killed", "killed_with_best", "always_killed", "nan", "nothing", "late"]
SWEEP = Sweep(
    name="stub",
    space=space,
    objective=objective,
    first=[{"x": 0.5, "does": "fine"}, {"x": 0.0, "does": "fine"}],
    ladder={"x": [0.1, 0.2, 0.3]},
    fixed={"does": "fine"},
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ogls.sweep.process._POLL", 0.05)
    Path("mlflow.db").write_bytes(empty_database.read_bytes())
    return tmp_path


def sweep(*arguments: str, of: Sweep = SWEEP) -> int:
    """Exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(of, arguments, script=STUB)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def study(name: str = "stub") -> optuna.Study:
    return optuna.load_study(study_name=name, storage="sqlite:///sweeps.db")


def states() -> list[str]:
    return [trial.state.name for trial in study().trials]


def table() -> pd.DataFrame:
    return pd.read_csv("runs/stub/trials.csv").set_index("trial")


def steps() -> Counter[str]:
    """How often each step of each run was made."""
    return Counter(Path("steps.txt").read_text().splitlines())


def only(*points: dict[str, object]) -> Sweep:
    return Sweep(name="stub", space=space, objective=objective, first=points)


def parent() -> tuple[MlflowClient, str]:
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    experiment = client.get_experiment_by_name("sweeps")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.method = 'sweep'")
    return client, run.info.run_id


def test_a_study_from_its_first_point_to_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[tuple[object, str]] = []
    monkeypatch.setitem(sys.modules, "optuna_dashboard", SimpleNamespace(save_note=lambda *note: notes.append(note)))
    of = only(*({"x": x, "does": "fine"} for x in (0.5, 0.0, 0.8, 0.9)))
    assert sweep("--n-trials", "4", "--seeds", "2", of=of) == 0
    assert [trial.params["x"] for trial in study().trials] == [0.5, 0.0, 0.8, 0.9]
    assert [trial.value for trial in study().trials] == pytest.approx([0.55, 0.05, 0.85, 0.95])  # mean of the seeds
    found = table()
    assert list(found["accuracy_s0"]) == pytest.approx([0.5, 0.0, 0.8, 0.9])
    assert list(found["accuracy_s1"]) == pytest.approx([0.6, 0.1, 0.9, 1.0])
    best = Path("runs/stub/best.yaml").read_text()
    assert best.startswith("# Trial 3 of the study stub: accuracy 0.95")
    assert json.loads(best.partition("\n")[2])["x"] == "0.9"
    html = Path("runs/stub/plots.html").read_text()
    assert "Parallel Coordinate" in html
    assert "<script src" not in html, "the page needs no network"
    assert "Hyperparameter Importances" in html
    assert "Rank" in html, "how two parameters act together"
    assert set(steps().values()) == {1}
    client, run = parent()
    assert client.get_run(run).info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run)} == {"best.yaml", "curve.png", "plots.html", "trials.csv"}
    about = client.get_run(run).data.tags["mlflow.note.content"]
    assert "Study stub: 4 complete" in about
    assert "best: trial 3, 0.9500: x 0.9, does fine" in about
    assert "`fit --config lab.yaml`" in about
    assert about.startswith("Study stub: 4 complete ([side by side](#/experiments/1/runs?")
    shown = json.loads(client.get_experiment("1").tags["mlflow.sharedViewState.study-stub"])
    assert shown["searchFilter"] == "tags.study = 'stub' AND tags.trial LIKE '%'"
    assert shown["orderByKey"] == "metrics.`final/avg_at_4`"
    assert shown["compareRunCharts"][0]["selectedParams"] == ["x"], "in which the trials differ"
    assert shown["compareRunCharts"][0]["selectedMetrics"] == ["final/avg_at_4"]
    assert "params.`x`" in shown["selectedColumns"]
    bests = {metric.step: metric.value for metric in client.get_metric_history(run, "final/avg_at_4")}
    assert bests == pytest.approx({1: 0.55, 2: 0.55, 3: 0.85, 4: 0.95}), "the best of so many trials"
    assert {name: client.get_run(run).data.params[name] for name in ("method", "seed")} == {
        "method": "sweep",
        "seed": "0 to 1",
    }
    history = client.get_metric_history(run, "trial/accuracy")
    assert {metric.step: metric.value for metric in history} == pytest.approx({0: 0.55, 1: 0.05, 2: 0.85, 3: 0.95})
    assert not list(Path("runs/stub").glob("*/checkpoints"))
    assert study().metric_names == ["accuracy"]
    assert sorted(dashboard_files()) == ["best.yaml", "curve.png", "plots.html", "trials.csv"]
    (about, text), *of_trials = notes
    assert isinstance(about, optuna.Study)
    assert text.startswith("`fit --config lab.yaml`\n\n2 seeds per trial. Runs and report: `runs/stub`")
    assert [text for _, text in of_trials] == [
        f"`runs/stub/stub-{i:03d}-s0`\n\n`runs/stub/stub-{i:03d}-s1`" for i in range(4)
    ]

    Path("runs/stub/plots.html").unlink()
    assert sweep("--n-trials", "4", "--seeds", "2", of=of) == 0, "nothing is left to do"
    assert dashboard_files()["plots.html"] == Path("runs/stub/plots.html").read_bytes(), "the newest, and no second one"


def test_the_first_seed_of_every_trial_can_be_another() -> None:
    assert sweep("--n-trials", "1", "--seeds", "2", "--first-seed", "5") == 0
    assert {line.split()[0] for line in steps()} == {"stub-000-s5", "stub-000-s6"}
    assert list(table().loc[0, ["accuracy_s5", "accuracy_s6"]]) == pytest.approx([1.0, 1.1]), "x, and 0.1 per seed"


def dashboard_files() -> dict[str, bytes]:
    """Contents of the study's artifacts by name, none of which may be there twice."""
    found = get_all_artifact_meta(study())
    assert len({meta.filename for meta in found}) == len(found)
    return {meta.filename: Path("runs/dashboard", meta.artifact_id).read_bytes() for meta in found}


@pytest.mark.fault("sweep: a trial fails, is killed, measures NaN", tried=5)
def test_what_goes_wrong_in_a_trial_stays_there() -> None:
    points = [{"x": 0.5, "does": does} for does in ("raise", "nan", "nothing", "killed", "fine")]
    assert sweep("--n-trials", "5", of=only(*points)) == 0
    assert states() == ["FAIL", "FAIL", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    found = table()
    assert "RuntimeError: out of luck" in found["why"][0]
    assert found["why"][1] == "stub-001-s0: accuracy is nan at step 2"
    assert "measured nothing" in found["why"][2]
    assert found["state"][3] == "COMPLETE", "a killed trial is made again"
    assert (steps()["stub-003-s0 1"], steps()["stub-003-s0 2"]) == (1, 2), "and goes on from its checkpoint"


@pytest.mark.fault("sweep: a trial fails, is killed, measures NaN")
def test_a_trial_killed_before_its_first_checkpoint_is_made_anew() -> None:
    assert sweep("--n-trials", "1", of=only({"x": 0.5, "does": "killed_with_best"})) == 0
    assert states() == ["FAIL", "COMPLETE"]
    assert (steps()["stub-000-s0 1"], steps()["stub-000-s0 2"]) == (2, 2)


def test_another_study_of_the_same_name_is_not_taken_for_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("--n-trials", "1", of=only({"x": 0.9, "does": "fine"})) == 0
    before = Path("runs/stub/stub-000-s0/metrics.jsonl").read_text()
    assert sweep("--n-trials", "1", "--storage", "sqlite:///new.db", of=only({"x": 0.1, "does": "fine"})) == 130
    told = capsys.readouterr().out
    assert "stub-000-s0 has a run with other options" in told
    assert '"0.9", "--does", "fine"], not [' in told
    assert Path("runs/stub/stub-000-s0/metrics.jsonl").read_text() == before


@pytest.mark.fault("sweep: a trial fails, is killed, measures NaN")
def test_a_trial_that_is_always_killed_is_given_up() -> None:
    assert sweep("--n-trials", "1", of=only({"x": 0.5, "does": "always_killed"})) == 0
    assert states() == ["FAIL"] * 3
    assert "given up" in table()["why"][0]
    assert sweep("--n-trials", "1", of=only({"x": 0.5, "does": "always_killed"})) == 0
    assert states() == ["FAIL"] * 3


def test_a_hopeless_trial_is_pruned() -> None:
    points = [{"x": 0.5 + 0.01 * i, "does": "fine"} for i in range(5)]
    points += [{"x": 0.6, "does": "late"}, {"x": 0.1, "does": "fine"}]
    assert sweep("--n-trials", "7", "--", "--seconds", "0.2", of=only(*points)) == 0
    assert states() == ["COMPLETE"] * 6 + ["PRUNED"], "at the last validation there is nothing left to save"
    assert steps()["stub-006-s0 4"] == 0
    assert sweep("--grid", "x=0.2", "does=fine", "--", "--seconds", "0.2", of=only(*points)) == 0
    assert states()[-1] == "COMPLETE", "on a ladder none is"


def test_two_of_three_trials_end_at_their_first_validation() -> None:
    points = [{"x": x, "does": "fine"} for x in (0.9, 0.5, 0.4)]
    assert sweep("--n-trials", "3", "--pruner", "halving", "--", "--seconds", "0.2", of=only(*points)) == 0
    assert states() == ["COMPLETE", "PRUNED", "PRUNED"]
    assert [steps()[f"stub-00{trial}-s0 4"] for trial in range(3)] == [1, 0, 0]


CONFIGURATION = (
    "trainer: {devices: 2, num_nodes: 2, max_epochs: 3, check_val_every_n_epoch: 1}\ndata: {steps_per_epoch: 10}"
)


def test_what_a_trial_costs_and_how_pruners_see_it() -> None:
    cost = Cost.of(CONFIGURATION, seeds=2)
    assert cost == Cost(devices=4, every=10, steps=60)
    assert Cost.of("{x: 1}", seeds=2) == Cost(devices=1, every=1, steps="auto")
    assert Cost.of("trainer: {devices: [0, 3, 5]}", seeds=1).devices == 3
    assert Cost.of("trainer: {devices: auto}", seeds=1).devices is None
    made = optuna.create_study(pruner=pruner("halving", cost), direction="maximize")
    # Four values at step 10, of which a third may go on: one, the best.
    for value, pruned in ((0.5, False), (0.4, True), (0.6, False), (0.55, True)):
        trial = made.ask()
        trial.report(value, 5)
        assert not trial.should_prune(), "before the first validation"
        trial.report(value, 10)
        assert trial.should_prune() == pruned
        made.tell(trial, value)
    kinds = [type(pruner(name, cost)).__name__ for name in ("median", "halving", "hyperband", "none")]
    assert kinds == ["MedianPruner", "SuccessiveHalvingPruner", "HyperbandPruner", "NopPruner"]


def test_device_hours_are_counted_over_attempts_and_devices() -> None:
    made = optuna.create_study()
    Cost(devices=4).keep(made)
    noon = datetime(2026, 1, 1, 12)
    for minutes, state in ((30, TrialState.COMPLETE), (60, TrialState.FAIL), (6, TrialState.PRUNED)):
        trial = optuna.trial.create_trial(state=state, value=1.0 if state == TrialState.COMPLETE else None)
        trial.datetime_start, trial.datetime_complete = noon, noon + timedelta(minutes=minutes)
        made.add_trial(trial)
    made.enqueue_trial({})
    assert spent_hours(made) == pytest.approx(4 * (0.5 + 1.0 + 0.1))


def test_a_budget_ends_a_study_and_a_larger_one_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    points = [{"x": 0.1 * i, "does": "fine"} for i in range(1, 4)]
    arguments = ("--n-trials", "3", "--", "--seconds", "0.4")  # 1.6 s a trial at the least
    assert sweep("--device-hours", str(2 / 3600), *arguments, of=only(*points)) == 0
    told = capsys.readouterr().out
    assert "The budget of 0.000555556 device hours is spent (0.00" in told
    assert "a larger --device-hours goes on" in told
    assert TrialState.WAITING in {trial.state for trial in study().trials}
    made = steps()
    assert sweep("--device-hours", str(2 / 3600), *arguments, of=only(*points)) == 0
    assert steps() == made, "spent is spent"
    assert sweep("--device-hours", "1", *arguments, of=only(*points)) == 0
    assert sorted(trial.params["x"] for trial in study().trials if trial.value) == pytest.approx([0.1, 0.2, 0.3])
    assert set(steps().values()) == {1}


def test_a_changed_search_space_may_not_join(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("--n-trials", "1") == 0

    def refused(high: float = 1.0, kinds: Sequence[str] = DOES, **more: object) -> str:
        def changed(trial: Trial) -> dict[str, object]:
            return {"x": trial.suggest_float("x", 0.0, high), "does": trial.suggest_categorical("does", kinds), **more}

        assert sweep("--n-trials", "2", of=Sweep(name="stub", space=changed, objective=objective)) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: the study 'stub' has another search space (")
        assert said.count("\n") == 1
        assert "Say --study NAME for a new study, or take the change of the space back" in said
        return said

    assert "(x: Float step" not in (said := refused(high=2.0))
    assert "x: Float low=0.0 high=1.0 log=False there, Float low=0.0 high=2.0 log=False here" in said
    assert "x: Float low=0.0 high=1.0 log=False there, Float low=0.0 high=0.25 log=False here" in refused(high=0.25)
    assert "does: Categorical choices=" in refused(kinds=[*DOES, "other"])
    assert "'fine' not in " in refused(kinds=["other"])
    assert "--seconds: nothing there, 0.1 here" in refused(seconds=0.1)
    assert states() == ["COMPLETE", "WAITING"], "and nothing has changed"
    assert sweep("--n-trials", "2") == 0


def test_two_objectives() -> None:
    assert sweep("--n-trials", "2", "--against", "length") == 0
    assert study().metric_names == ["accuracy", "length"]
    assert [trial.values for trial in study().trials] == [pytest.approx([0.5, 5.0]), pytest.approx([0.0, 0.0])]
    assert "Pareto" in Path("runs/stub/plots.html").read_text()


def test_the_ladder_and_other_rungs() -> None:
    assert sweep("--grid", "--jobs", "2") == 0
    assert sorted(trial.params["x"] for trial in study().trials) == [0.1, 0.2, 0.3]
    assert sweep("--grid", "x=0.3,0.7", "does=fine") == 0
    assert sorted(trial.params["x"] for trial in study().trials) == [0.1, 0.2, 0.3, 0.7]


@pytest.mark.fault("sweep: a trial fails, is killed, measures NaN")
def test_ctrl_c_and_the_same_command_again(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        while not Path("steps.txt").exists() or len(steps()) < 6:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    of = only(*({"x": 0.5 + i / 10, "does": "fine"} for i in range(4)))
    arguments = ("--n-trials", "4", "--", "--seconds", "0.3")
    threading.Thread(target=interrupt).start()
    assert sweep(*arguments, of=of) == 130
    assert states().count("COMPLETE") == 1
    assert states().count("FAIL") == 1
    client, run = parent()
    assert client.get_run(run).info.status == "KILLED"
    assert sweep(*arguments, of=of) == 0
    assert [trial.params["x"] for trial in study().trials if trial.state == TrialState.COMPLETE] == pytest.approx(
        [0.5, 0.7, 0.8, 0.6]
    )
    assert set(steps().values()) == {1}, "no step of any run was made twice"
    client, again = parent()
    assert (again, client.get_run(run).info.status) == (run, "FINISHED")
    assert "trial 1: interrupted, the sweep was stopped; queued again" in capsys.readouterr().out


def test_timeout_stops_as_ctrl_c_does() -> None:
    assert sweep("--n-trials", "3", "--timeout", "1", "--", "--seconds", "0.5") == 130
    assert states().count("WAITING") >= 1


def test_a_study_of_other_settings_is_not_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("--n-trials", "1") == 0
    assert sweep("--n-trials", "2", "--seeds", "3") == 2
    assert "seeds: 1 there, 3 here" in capsys.readouterr().err
    assert sweep("--n-trials", "2", "--first-seed", "5") == 2
    assert "first_seed: 0 there, 5 here" in capsys.readouterr().err
    assert sweep("--n-trials", "2", "--against", "kl") == 2
    assert "objectives: 1 there, 2 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--n-trials", "0"], "--n-trials must be at least 1, got 0"),
        (["--first-seed", "-1"], "--first-seed must be at least 0, got -1"),
        (["--device-hours", "0"], "--device-hours must be above 0, got 0"),
        (["--pruner", "halving", "--against", "kl"], "--pruner halving: with --against nothing is pruned"),
        (["--storage", "sqlite:///mlflow.db"], "cannot share a file"),
        (["--storage", "grpc://nowhere"], "expected grpc://host:port"),
        (["--study", "../up"], "--study becomes a folder"),
        (["--grid", "x"], "--grid takes NAME=VALUE"),
        (["--n-trails", "3"], "unrecognized arguments: --n-trails"),
        (["--", "--typo", "1"], "run.py does not accept"),
    ],
)
def test_bad_input_ends_before_there_is_a_study(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(*arguments) == 2
    assert complaint in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_tracking_server_that_is_away(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ogls.sweep.record._PATIENCE_SERVER", 2.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert sweep("--n-trials", "2", "--tracking-uri", "http://127.0.0.1:9") == 0
    assert states() == ["COMPLETE"] * 2
    assert "MLflow lacks" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.fault("sweep: a trial fails, is killed, measures NaN")
def test_a_killed_sweep_leaves_no_process_behind_and_is_gone_on_with(place: Path) -> None:
    code = "import sys; from test_study import *; main(SWEEP, sys.argv[1:], script=STUB)"
    arguments = ["--n-trials", "2", "--", "--seconds", "0.5"]
    killed = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=place, env={**os.environ, "PYTHONPATH": str(STUB.parent)}
    )
    while not Path("steps.txt").exists():
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    assert sweep(*arguments) == 0
    assert states() == ["FAIL", "COMPLETE", "COMPLETE"]
    assert set(steps().values()) == {1}
