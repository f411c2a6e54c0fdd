"""The record of a run: what MLflow and the JSONL file hold afterwards, and what a server that is away costs."""

from __future__ import annotations

import json
import math
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from tiny import STEPS, Tiny, TinyData, trainer

from ogls.tracking import Tracker, pages, tracker
from ogls.tracking import config as tracker_config
from ogls.tracking.config import differences, flatten, parameters
from ogls.tracking.files import METRICS, read_rows
from ogls.tracking.mlflow_run import MLflowRun
from ogls.tracking.outbox import Outbox
from ogls.tracking.replay import replay
from tests.faults.nursery import Nursery


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Path]:
    """A working directory with a finished run in it: validated, then two epochs of which the first is best."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("tracking")
        patch.chdir(path)
        shutil.copy(empty_database, path)
        made = trainer(2, run_name="finished", tags={"purpose": "test"})
        model, data = Tiny(rises=False), TinyData(seed=3)
        assert isinstance(made.logger, Tracker)
        with made.logger.kept_open():
            made.validate(model, data, verbose=False)
        made.fit(model, data)
        yield path


def runs(place: Path, name: str) -> list[Run]:
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'ogls'")
    return client.search_runs([experiment.experiment_id], f"run_name = '{name}'")


def artifact(run: Run, file: str) -> Any:
    return json.loads((Path(run.info.artifact_uri.removeprefix("file://")) / file).read_text())


def history(place: Path, run: Run, metric: str) -> dict[int, float]:
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    return {m.step: m.value for m in client.get_metric_history(run.info.run_id, metric)}


def test_finished_run_has_name_tags_and_state(place: Path) -> None:
    (run,) = runs(place, "finished")
    assert run.info.status == "FINISHED"
    assert {"method": "tiny", "seed": "3", "purpose": "test"}.items() <= run.data.tags.items()


def test_steps_count_the_updates_made(place: Path) -> None:
    (run,) = runs(place, "finished")
    assert list(history(place, run, "train/loss")) == list(range(1, 2 * STEPS + 1))
    assert history(place, run, "val/avg_at_4") == pytest.approx({0: 1.0, STEPS: 0.6, 2 * STEPS: 0.2})
    assert run.data.metrics["final/avg_at_4"] == pytest.approx(0.2)


def test_jsonl_has_every_row_of_mlflow(place: Path) -> None:
    (run,) = runs(place, "finished")
    rows = [json.loads(line) for line in (place / "runs/finished/metrics.jsonl").read_text().splitlines()]
    for metric in ("train/loss", "train/accuracy", "val/avg_at_4", "final/avg_at_4"):
        assert {row["step"]: row[metric] for row in rows if metric in row} == history(place, run, metric)


def test_one_table_of_completions_each_validation(place: Path) -> None:
    (run,) = runs(place, "finished")
    table = artifact(run, f"completions/step-{STEPS:06d}.json")
    assert len(table["data"]) == 3
    tables = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert [t["path"][-8:-5] for t in tables] == ["000", "004", "008"]
    row = dict(zip(table["columns"], table["data"][1], strict=True))
    assert row["problem"] == "What is 1?"
    assert row["completion"] == "\\boxed{1}"
    assert row["correct"] is False


def test_accuracy_of_every_problem_each_validation(place: Path) -> None:
    (run,) = runs(place, "finished")
    file = f"problems/step-{STEPS:06d}.json"
    assert artifact(run, file) == {"p0": 1.0, "p1": 0.0, "p2": 1.0}
    assert json.loads((place / "runs/finished" / file).read_text()) == artifact(run, file)


def test_data_are_described(place: Path) -> None:
    (run,) = runs(place, "finished")
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {"train", "val"}
    described = artifact(run, "data.json")
    assert described["train"]["problems"] == 3
    assert described["val"]["first"][0] == {"id": "p0", "text": "What is 0?", "answer": "0"}


def test_adapter_of_the_best_checkpoint_is_an_artifact(place: Path) -> None:
    (run,) = runs(place, "finished")
    folder = Path(run.info.artifact_uri.removeprefix("file://")) / "best_adapter"
    assert float((folder / "adapter.txt").read_text()) == 1 + 2 + 3 + 4  # accuracy falls: the first epoch's


def test_system_metrics_are_watched(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    logger = Tracker(run_name="watched", folder=str(tmp_path))
    logger.log_metrics({"train/loss": 1.0}, 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not any(
        k.startswith("system/") for r in runs(place, "watched") for k in r.data.metrics
    ):
        time.sleep(0.3)
    logger.finalize("success")
    assert any(name.startswith("system/cpu") for name in runs(place, "watched")[0].data.metrics)


def test_parameters_and_configuration(tmp_path: Path, place: Path) -> None:
    text = "model:\n  steering: {class_path: ogls.loss.steering.OutcomeSteering, init_args: {alpha: 1.5}}\n"
    text += "trainer: {logger: {class_path: Tracker}}\n"
    made = trainer(1, run_name="configured", system_metrics=False, folder=str(tmp_path))
    assert isinstance(made.logger, Tracker)
    made.logger.configure(text, parameters(yaml.safe_load(text)))
    made.fit(Tiny(), TinyData())
    (run,) = runs(place, "configured")
    assert run.data.params == {
        "model.steering": "OutcomeSteering",
        "model.steering.alpha": "1.5",
        "method": "tiny",
        "seed": "0",
    }
    assert "alpha: 1.5" in (Path(run.info.artifact_uri.removeprefix("file://")) / "config.yaml").read_text()


def test_flatten_by_hand() -> None:
    config = {
        "a": 1,
        "b": {"c": None, "d": {"class_path": "x.y.Z", "init_args": {"e": [1, 2]}}},
        "f": {"class_path": "G"},
    }
    assert flatten(config) == {"a": 1, "b.c": None, "b.d": "Z", "b.d.e": [1, 2], "f": "G"}


def test_differences_by_hand() -> None:
    before = {"method.steering.alpha": "1.0", "trainer.max_epochs": "2", "data.train": "Chains"}
    assert differences(before, before) == []
    assert differences(before, before | {"trainer.max_epochs": "3"}) == []
    assert differences(before, before | {"data.late": "None"}) == [], "an option of a later version, switched off"
    moved = {"data.engine.urls": "['http://node2:8001']", "data.engine.start_within": "1200"}
    assert differences(before | {"data.engine.urls": "['http://node1:8001']"}, before | moved) == [], (
        "a job's new nodes"
    )
    assert differences(before, {"trainer.max_epochs": "2", "data.train": "Chains", "data.seed": "0"}) == [
        "method.steering.alpha: 1.0 there, nothing here",
        "data.seed: nothing there, 0 here",
    ]


def test_what_a_resumed_run_changes_is_a_tag(tmp_path: Path, place: Path) -> None:
    first = Tracker(run_name="changed", folder=str(tmp_path), system_metrics=False)
    first.configure("lr: 1", {"lr": 1, "long": "x" * 1000})
    first.log_config()
    first.end_as("KILLED")
    first.finalize("failed")
    assert runs(place, "changed")[0].info.status == "KILLED"
    second = Tracker(folder=str(tmp_path), system_metrics=False)
    second.resume(first.run_id, None)
    second.configure("lr: 2", {"lr": 2, "long": "x" * 1000, "new": 3})
    second.log_config()
    second.finalize("success")
    (run,) = runs(place, "changed")
    assert run.info.status == "FINISHED"
    assert (run.data.params["lr"], run.data.params["new"], len(run.data.params["long"])) == ("1", "3", 250)
    assert json.loads(run.data.tags["changed"]) == {"lr": "2"}


def test_a_step_that_is_made_again_is_told_again_only_where_it_came_out_otherwise(tmp_path: Path, place: Path) -> None:
    def tracker_of(run_id: str | None) -> Tracker:
        made = Tracker(run_name="again", folder=str(tmp_path), system_metrics=False)
        if run_id is not None:
            made.resume(run_id, tmp_path / "again")
            made.rewind(1, {})
        return made

    first = tracker_of(None)
    for step, loss in ((1, 3.0), (2, math.nan), (3, 1.0)):
        first.log_metrics({"train/loss": loss, "train/same": 0.1, "time/student": 0.5 * step}, step)
    first.finalize("failed")
    second = tracker_of(first.run_id)
    for step, loss in ((2, math.nan), (3, 0.5)):
        second.log_metrics({"train/loss": loss, "train/same": 0.1, "time/student": 9.0}, step)
    second.finalize("success")
    (run,) = runs(place, "again")
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")

    def told(name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]

    assert [step for step, _ in told("train/loss")] == [1, 2, 3, 3]
    assert told("train/loss")[2:] == [(3, 1.0), (3, 0.5)]
    assert told("train/same") == [(1, 0.1), (2, 0.1), (3, 0.1)]
    assert told("time/student") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert run.data.metrics["train/loss"] == 0.5


def test_child_run_points_at_its_parent(tmp_path: Path, place: Path) -> None:
    (parent,) = runs(place, "finished")
    child = Tracker(run_name="child", folder=str(tmp_path), parent_run_id=parent.info.run_id, system_metrics=False)
    child.log_metrics({"train/loss": 1.0}, 1)
    child.finalize("failed")
    (run,) = runs(place, "child")
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.info.status == "FAILED"


def test_the_printed_command_names_the_database(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    logger = Tracker(run_name="printed", folder=str(tmp_path), system_metrics=False)
    logger.log_metrics({"train/loss": 1.0}, 1)
    logger.finalize("success")
    printed = capsys.readouterr().out
    assert f"mlflow ui --backend-store-uri sqlite:///{place}/mlflow.db --host 127.0.0.1" in printed
    assert str(tmp_path / "printed" / "metrics.jsonl") in printed


@pytest.mark.fault("tracking server away or hung")
@pytest.mark.parametrize("answers", [False, True], ids=["closed port", "server that never answers"])
def test_a_server_that_is_away(
    answers: bool, nursery: Nursery, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """It waits 1 s here; a process that waited for MLflow's own patience would take 30 s, however quick the machine."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen()
        process = nursery.fork("track", f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path)
        start = time.monotonic()
        assert nursery.wait(process) == 0
        seconds = time.monotonic() - start
    assert seconds < 20
    assert tracker._PATIENCE_SERVER < 10
    assert len((tmp_path / "r/metrics.jsonl").read_text().splitlines()) == 200
    cost = float((tmp_path / "cost").read_text())
    assert cost < 0.01
    record_property("figure", f"{1000 * cost:.2f} ms a step, {seconds - 1.0 + tracker._PATIENCE_SERVER:.1f} s to end")


def test_ipython_is_whole_before_the_outbox_speaks_to_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests import it in the outbox's thread, where a figure that is drawn meanwhile would find half of it."""
    (tmp_path / "IPython").mkdir()
    (tmp_path / "IPython" / "__init__.py").write_text("import threading; by = threading.current_thread()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "IPython", None)  # so that the one below is gone after the test
    del sys.modules["IPython"]
    MLflowRun("http://127.0.0.1:9", "experiment", "name", {}, system_metrics=False)
    assert sys.modules["IPython"].by is threading.main_thread()


def test_metric_names_mlflow_would_change_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pass@8"):
        Tracker(folder=str(tmp_path)).log_metrics({"val/pass@8": 1.0}, 1)


@pytest.mark.fault("names that become paths")
@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "x" * 65, "a b", "a\n"])
def test_names_that_become_folders(name: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Tracker(run_name=name)


@pytest.mark.fault("names that become paths", tried=200)
@settings(max_examples=200)
@given(st.text() | st.from_regex(r"[\\./~A-Za-z0-9]{1,70}", fullmatch=True))
def test_whatever_name_is_taken_its_folder_lies_below_the_folder_of_runs(name: str) -> None:
    described = Tracker(folder="runs")
    described.describe(name, 0)
    made = [described]
    with suppress(ValueError):
        made.append(Tracker(folder="runs", run_name=name))
    for one in made:
        assert one.run_folder.resolve().parent == Path("runs").resolve()
        assert one.run_folder.name


def test_a_run_is_called_after_its_method_and_seed() -> None:
    made = Tracker()
    assert re.fullmatch(r"run-\d{6}-\d{6}-\w{4}", made.run_name)
    made.describe("OPSD[selection=ErrorSpan]", 3)
    assert made.label == "OPSD-selection-ErrorSpan-s3"
    assert re.fullmatch(r"OPSD-selection-ErrorSpan-s3-\d{6}-\d{6}-\w{4}", made.run_name)
    named = Tracker(run_name="mine")
    named.describe("OPSD", 3)
    assert (named.run_name, named.label) == ("mine", "OPSD-s3")


@pytest.mark.parametrize(
    ("method", "given", "title"),
    [
        ("OPSD", {}, "OPSD s3"),
        ("OPSD[selection=ErrorSpan]", {}, "OPSD[...] s3"),
        ("OPSD", {"model.learning_rate": "0.001", "data.group_size": "8"}, "OPSD s3 learning_rate=0.001 group_size=8"),
        ("OPSD", {"data.prompts.system": "x" * 200}, "OPSD s3 system=" + "x" * 105),
    ],
)
def test_mlflow_lists_a_run_by_what_makes_it_different(method: str, given: dict[str, str], title: str) -> None:
    made = Tracker()
    made.describe(method, 3, given)
    assert made._run.name == title
    assert made._run.tags["folder"] == made.run_name


def test_what_differs_from_the_first_configuration(tmp_path: Path) -> None:
    first, second = tmp_path / "math.yaml", tmp_path / "opsd.yaml"
    first.write_text("model: {learning_rate: 1.0e-3}\n")
    second.write_text(
        "method: {class_path: OPSD, init_args: {temperature: 2.0}}\ndata: {val: {class_path: Chains}}\n"
        "seed_everything: 4\ntrainer: {max_epochs: 3, devices: 2, logger: {init_args: {run_name: x}}}\n"
    )
    words = ["fit", "--config", str(first), f"--config={second}", "--model.learning_rate", "1e-4", "--allow_changes"]
    words += ["--method.temperature=1", "--data.group_size=8", "--ckpt_path", "last", "--trainer.devices", "1"]
    expected = {"method.temperature": "1", "data.val": "Chains", "trainer.max_epochs": "3"}
    assert tracker_config.given(words) == expected | {"model.learning_rate": "1e-4", "data.group_size": "8"}
    assert tracker_config.given([*words[:3], "--model.learning_rate", "0.001"]) == {}, "as it was"
    inline = [*words[:3], "--config", " {data: {group_size: 8}}", '--config={"data": {"seed": 1}}']
    assert tracker_config.given(inline) == {"data.group_size": "8", "data.seed": "1"}


@pytest.mark.parametrize(
    ("words", "differing"),
    [
        (["--method.selection", "UpToError"], {}),
        (["--method.selection", "ErrorSpan"], {"method.selection": "ErrorSpan"}),
        (["--method.init_args.steering.init_args.alpha=2"], {"method.steering.alpha": "2"}),
        (
            ["--method.steering", '{"class_path": "OutcomeSteering", "init_args": {"alpha": 2, "ramp_steps": 4}}'],
            {"method.steering.alpha": "2", "method.steering.ramp_steps": "4"},
        ),
        (["--method", "OPSD", "--method.selection", "UpToError"], {"method.selection": "UpToError"}),
        (["--method", "OPSD"], {}),
    ],
)
def test_of_the_method_only_what_is_changed_is_said(
    words: list[str], differing: dict[str, str], tmp_path: Path
) -> None:
    steering = "{class_path: ogls.loss.steering.OutcomeSteering, init_args: {alpha: 1}}"
    own = f"{{class_path: OGLS_SD, init_args: {{selection: UpToError, steering: {steering}}}}}"
    (tmp_path / "lab.yaml").write_text(f"method: {own}\n")
    assert tracker_config.given(["fit", "--config", str(tmp_path / "lab.yaml"), *words]) == differing


def test_the_trainers_own_defaults_are_no_parameters() -> None:
    text = (
        "trainer: {max_epochs: 2, devices: 1, fast_dev_run: false, benchmark: null, profiler: null}\nmodel: {x: null}"
    )
    assert parameters(yaml.safe_load(text)) == {"trainer.max_epochs": 2, "trainer.devices": 1, "model.x": None}


def test_a_runs_page_says_what_it_was_and_what_it_brought(place: Path) -> None:
    (run,) = runs(place, "finished")
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("**tiny**, seed 3\n\navg_at_4: 1.000 [")
    assert "before training, 0.200 [" in note
    assert f"`{sys.argv[0]}" in note
    assert "Folder: `runs/finished`" in note


def test_the_page_of_runs_shows_accuracy_first(place: Path) -> None:
    """What MLflow's pages read was looked at in a browser; here, that it is there and names metrics that there are."""
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    found = client.get_experiment_by_name("ogls")
    assert found is not None
    shown = json.loads(found.tags["mlflow.sharedViewState.ogls"])
    assert shown["compareRunCharts"][0]["metricKey"] == "final/avg_at_4"
    (run,) = runs(place, "finished")
    told = {f"metrics.`{name}`" for name in run.data.metrics} | {f"params.`{name}`" for name in ("method", "seed")}
    assert {c for c in shown["selectedColumns"] if not c.startswith("attributes") and "high" not in c} <= told
    sections = {section["uuid"] for section in shown["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in shown["compareRunCharts"]} == sections


def test_two_runs_of_one_name_are_told_apart(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on without knowing its id is found by its folder, not by its name, which others have too."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path)
    ids = []
    for _ in range(2):
        made = Tracker(system_metrics=False)
        made.describe("OPSD", 0)
        made.log_metrics({"train/loss": 1.0}, 1)
        made.finalize("success")
        ids.append((made.run_id, made.run_folder))
    for run_id, folder in ids:
        again = Tracker(system_metrics=False)
        again.describe("OPSD", 0)
        again.resume(None, folder)
        again.log_metrics({"train/loss": 2.0}, 2)
        again.finalize("success")
        assert again.run_id == run_id


def test_long_names_that_begin_alike_are_told_apart() -> None:
    choices = "OGLS_SD[max_peers=1, alpha=1, ramp_steps=0, clip=None, selection={}]"
    labels = []
    for selection in ("ErrorSpan", "UpToError", "ErrorSpan"):
        made = Tracker()
        made.describe(choices.format(selection), 0)
        labels.append(made.label)
    assert labels[0] == labels[2] != labels[1]
    assert all(label.startswith("OGLS_SD-max_peers-1-alpha-1") and len(label) <= 43 for label in labels)


def test_addresses_are_those_of_the_server_or_of_the_one_that_is_to_be_started() -> None:
    assert pages.address("sqlite:///mlflow.db", pages.page_of_run("2", "abc")) == (
        "http://127.0.0.1:5000/#/experiments/2/runs/abc?workflowType=machine_learning"
    )
    assert pages.address("http://tracker:80/", pages.page_of_comparison(["2", "2"], ["a", "b"])) == (
        "http://tracker:80/#/compare-runs?runs=[%22a%22,%22b%22]&experiments=[%222%22]"
    )


def test_a_password_in_the_address_is_refused() -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        Tracker(tracking_uri="https://me:hunter2@mlflow.example")
    assert "hunter2" not in str(caught.value)


@pytest.mark.fault("tracking server away or hung")
def test_a_deleted_experiment_is_told_at_once_and_restored(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")  # by its whole path: MLflow keeps stores by address
    number = client.create_experiment("cleaned", artifact_location=(tmp_path / "mlartifacts").as_uri())
    client.delete_experiment(number)
    made = trainer(1, experiment="cleaned", run_name="second")
    model, told = (
        Tiny(during={1: lambda: during.append(capsys.readouterr().err)}),
        f"mlflow experiments restore -x {number}",
    )
    during: list[str] = []
    deadline = time.monotonic() + 30
    assert isinstance(made.logger, Tracker)
    made.logger.configure("trainer: {max_epochs: 1}\n", {"trainer.max_epochs": 1})
    made.logger.log_metrics({"train/loss": 0.5}, 0)
    while made.logger._box.error is None and time.monotonic() < deadline:
        time.sleep(0.01)
    made.fit(model, TinyData())
    assert told in during[0], "before the first step has ended"
    assert told in capsys.readouterr().out, "and at the end"
    command = [sys.executable, "-m", "ogls.tracking.replay", "runs/second"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the experiment 'cleaned' was deleted in MLflow")
    assert len(refused.stderr.splitlines()) == 1
    client.restore_experiment(number)
    rows = read_rows(Path("runs/second") / METRICS)
    assert replay(Path("runs/second"), f"sqlite:///{tmp_path}/mlflow.db") == len(rows) > STEPS


def test_a_run_whose_server_was_away_is_replayed(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker, "_PATIENCE_SERVER", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Tracker(tracking_uri="http://127.0.0.1:9", folder=str(tmp_path), run_name="away", tags={"purpose": "test"})
    away.describe("tiny", 0)
    away.configure("lr: 1\n", {"lr": 1})
    away.log_config()
    for step in range(1, 6):
        away.log_metrics({"train/loss": 1.0 / step, "train/accuracy": 0.5}, step)
    away.log_metrics({"val/avg_at_4": 0.25}, 5)
    away.log_problems({"p0": 0.25}, 5)
    away.finalize("success")
    assert f"python -m ogls.tracking.replay {tmp_path / 'away'}" in capsys.readouterr().out

    uri = f"sqlite:///{place}/mlflow.db"
    assert replay(tmp_path / "away", uri) == 7
    assert replay(tmp_path / "away", uri) == 0  # nothing twice
    (run,) = runs(place, "away")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "1", "method": "tiny", "seed": "0"}
    assert run.data.tags["purpose"] == "test"
    assert artifact(run, "problems/step-000005.json") == {"p0": 0.25}
    rows = read_rows(tmp_path / "away" / METRICS)
    times = [int(row["time"] * 1000) for row in rows]
    assert (run.info.start_time, run.info.end_time) == (times[0], times[-1])
    for metric in ("train/loss", "val/avg_at_4", "final/avg_at_4"):
        assert {row["step"]: row[metric] for row in rows if metric in row} == history(place, run, metric)
    with pytest.raises(ValueError, match=r"is no run's folder: metrics.jsonl is missing"):
        replay(tmp_path, uri)


def test_going_on_takes_back_the_rows_that_are_made_again(tmp_path: Path) -> None:
    first = Tracker(tracking_uri="http://127.0.0.1:9", folder=str(tmp_path), run_name="r")
    rows = [{"step": step, "time": 0.0, "train/loss": float(step)} for step in (1, 2, 3, 4)]
    first.run_folder.mkdir()
    (first.run_folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (0, 2, 4):
        first.log_problems({"p": 0.5}, step)
    first.rewind(2, {"train/loss": 2.0})
    assert sorted(file.name for file in first.run_folder.glob("problems/*")) == ["step-000000.json", "step-000002.json"]
    assert read_rows(first.run_folder / METRICS) == rows[:2]
    first.rewind(3, {"train/loss": 3.0})  # a kill came before the row of step 3
    assert [(row["step"], row["train/loss"]) for row in read_rows(first.run_folder / METRICS)] == [
        (1, 1),
        (2, 2),
        (3, 3),
    ]


@pytest.mark.fault("disk full")
def test_a_row_that_the_disk_has_no_room_for_is_left_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(tracking_uri="http://127.0.0.1:9", folder=str(tmp_path), run_name="r")
    monkeypatch.setattr(tracker._run, "metrics", lambda *_: None)
    tracker.log_metrics({"train/loss": 1.0}, 1)
    size = (tracker.run_folder / METRICS).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        tracker.log_metrics({"train/loss": 2.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    tracker.log_metrics({"train/loss": 3.0}, 3)
    assert [row["step"] for row in read_rows(tracker.run_folder / METRICS)] == [1, 3]


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns"])
def test_file_stores_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="sqlite:///file"):
        Tracker(tracking_uri=uri)


def test_outbox_loses_what_raises_and_what_does_not_fit() -> None:
    made: list[int] = []
    box = Outbox(capacity=3)
    box.put(lambda: time.sleep(0.2))
    time.sleep(0.05)  # the thread is busy with it, the queue empty
    for i in range(4):
        box.put(lambda i=i: made.append(1 // (i - 1)))
    box.close(timeout=5)
    assert made == [-1, 1]  # i = 1 divides by zero, i = 3 does not fit
    assert box.lost == 2
    assert box.error is not None


def test_two_runs_that_begin_a_new_database_at_once(nursery: Nursery, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new.db"
    runs = [nursery.fork("begin_database", uri, name) for name in ("one", "two", "three")]
    assert [nursery.wait(run) for run in runs] == [0, 0, 0]
    found = MlflowClient(uri).search_runs(["1"])
    assert sorted(run.info.run_name for run in found) == ["one", "three", "two"]
    assert all(run.data.params == {"a": "1"} and run.data.metrics == {"b": 2.0} for run in found)
