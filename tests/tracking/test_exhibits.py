"""The best model and the prompts' templates, as MLflow has them."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from ogls.lessons.prompts import ATTEMPT, Prompts
from ogls.tracking import best, prompts, traces
from ogls.tracking.mlflow_run import MLflowRun
from ogls.tracking.ui import addresses
from tests.sweep.test_several_machines import free_port, mlflow_server
from tests.tracking.test_traces import wrong


@pytest.fixture
def store(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


def begun(store: str, run_id: str | None = None, experiment: str = "ogls") -> MLflowRun:
    made = MLflowRun(store, experiment, "OPSD[...] s0", {"folder": "opsd-0"}, False)
    made.run_id, made.resumed = run_id, run_id is not None
    made.open()
    return made


ROWS: list[dict[str, Any]] = [
    {"step": 0, "time": 1.0, "val/avg_at_4": 0.9},
    {"step": 4, "time": 2.25, "val/avg_at_4": 0.5, "val/length_mean": 8.0},
    {"step": 4, "time": 2.3, "train/loss": 1.0},
    {"step": 8, "time": 3.0, "val/avg_at_4": 0.5},
    {"step": 12, "time": 4.0, "val/avg_at_4": math.nan},
]


def test_the_best_is_the_first_of_the_highest_in_training() -> None:
    assert best.best_of(ROWS, "val/avg_at_4") == ROWS[1]
    assert best.best_of(ROWS[:1], "val/avg_at_4") is None
    assert best.best_of(ROWS, "val/other") is None


def told(step: int, folder: Path) -> dict[str, Any]:
    row = next(row for row in ROWS if row["step"] == step and "val/avg_at_4" in row)
    return best.told(row, "val/avg_at_4", {"train": "aaa", "val": "bbb"}, folder)


def test_the_best_model_has_its_metrics_and_data_and_is_registered_once(store: str, tmp_path: Path) -> None:
    run = begun(store)
    run.add(ROWS[:2])
    (tmp_path / "best_adapter").mkdir()
    for again in (run, begun(store, run.run_id)):
        best.write(again, told(4, tmp_path), {"model.learning_rate": 0.1}, "student")
    client, run_id = run.open()
    assert run.experiment_id is not None
    (model,) = client.search_logged_models([run.experiment_id])
    assert (model.name, str(model.status), model.params) == ("OPSD s0 step 4", "READY", {"model.learning_rate": "0.1"})
    metrics = model.metrics
    assert metrics is not None
    assert {(m.key, m.value, m.step, m.dataset_name, m.dataset_digest) for m in metrics} == {
        ("val/avg_at_4", 0.5, 4, "val", "bbb"),
        ("val/length_mean", 8.0, 4, "val", "bbb"),
    }
    history = [(m.step, m.value) for m in client.get_metric_history(run_id, "val/avg_at_4")]
    assert history == [(0, 0.9), (4, 0.5)], "the run has no value twice"
    (version,) = client.search_model_versions("name = 'student'")
    assert version.source == f"{client.get_run(run_id).info.artifact_uri}/best_adapter"
    assert version.description == "val/avg_at_4 0.500 after step 4"
    outputs = client.get_run(run_id).outputs
    assert outputs is not None
    (output,) = outputs.model_outputs
    assert (output.model_id, output.step) == (model.model_id, 4)


def test_a_run_that_goes_on_replaces_its_best_model(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(store)
    best.write(run, told(4, tmp_path), {}, None)
    with monkeypatch.context() as patch:  # a kill amid the next one
        patch.setattr(MlflowClient, "finalize_logged_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            best.write(run, told(8, tmp_path), {}, None)
    best.write(begun(store, run.run_id), told(8, tmp_path), {}, None)
    client, _ = run.open()
    assert run.experiment_id is not None
    assert [model.name for model in client.search_logged_models([run.experiment_id])] == ["OPSD s0 step 8"]


def test_templates_of_a_run_by_hand() -> None:
    method: Any = SimpleNamespace(
        privilege=SimpleNamespace(views={"success": ATTEMPT, "failure": ATTEMPT}), reflector=None
    )
    plain = Prompts(student="Q: {problem}")
    assert prompts.used(plain, method) == {"student": "Q: {problem}", "view.attempt": ATTEMPT.template}
    method.reflector = "one"
    own = Prompts(student="Q: {problem}", views={"attempt": "{problem} {text}"}, system="Be brief.")
    assert prompts.used(own, method) == {
        **{"student": "Q: {problem}", "system": "Be brief.", "view.attempt": "{problem} {text}"},
        **{"reflect_wrong": own.reflect_wrong, "reflect_right": own.reflect_right},
    }


def test_equal_templates_make_no_new_version(store: str) -> None:
    runs = [begun(store), begun(store), begun(store, experiment="other")]
    texts = ["{problem} \\boxed{}", "{problem}!", "{problem} \\boxed{}"]
    for run, text in zip(runs, texts, strict=True):
        prompts.write(run, {"student": text})
    client = MlflowClient(store)
    found: list[Any] = [client.get_prompt_version("ogls.student", str(version)) for version in (1, 2)]
    assert [version.template for version in found] == ["{{problem}} \\boxed{}", "{{problem}}!"]
    assert found[0].variables == {"problem"}
    linked = [client.get_run(run.open()[1]).data.tags["mlflow.linkedPrompts"] for run in runs]
    assert linked == [f'[{{"name": "ogls.student", "version": "{version}"}}]' for version in (1, 2, 1)]
    for run in runs:
        asked = f"experiment_id = '{run.experiment_id}'"
        assert [prompt.name for prompt in client.search_prompts(asked)] == ["ogls.student"]
    with pytest.raises(Exception, match="not found"):
        client.get_model_version("ogls.student", "3")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_takes_prompts_traces_and_the_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server checks what a database takes as it comes, such as the sources of versions."""
    monkeypatch.chdir(tmp_path)
    port, environment = free_port(), os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with mlflow_server(tmp_path, port, environment):
        run = begun(f"http://127.0.0.1:{port}")
        run.add(ROWS[:2])
        (tmp_path / "best_adapter").mkdir()
        for folder, name in ((tmp_path, "adapter"), (tmp_path / "elsewhere", "weights")):
            best.write(run, told(4, folder), {}, name)
        prompts.write(run, {"student": "{problem}!"})
        assert traces.write(run, [wrong()]) == 1
        client, run_id = run.open()
        sources = {name: client.get_model_version(name, "1").source for name in ("adapter", "weights")}
        assert sources["adapter"] == f"{client.get_run(run_id).info.artifact_uri}/best_adapter"
        found: Any = client.get_prompt_version("ogls.student", "1")
        assert found.template == "{{problem}}!"
        (trace,) = client.search_traces(locations=[str(run.experiment_id)])
        assert trace.data.spans[0].name == "rollout"


def test_the_pages_addresses_are_told_before_they_are_served(store: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no runs yet"):
        addresses("sqlite:///mlflow.db", 5000)
    run = begun(store)
    page = f"#/experiments/{run.experiment_id}/runs?workflowType=machine_learning"
    (found,) = addresses("sqlite:///mlflow.db", 5001).items()
    assert found[0] == "ogls"
    assert found[1].startswith(f"http://127.0.0.1:5001/{page}&compareRunsMode=CHART")
    with pytest.raises(ValueError, match=r"there is no none\.db"):
        addresses("sqlite:///none.db", 5000)
    with pytest.raises(ValueError, match="is served already"):
        addresses("http://127.0.0.1:5000", 5000)
