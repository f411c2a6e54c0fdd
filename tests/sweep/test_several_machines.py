"""Workers that share a study: two processes, one gRPC proxy before Optuna's database, one MLflow server; loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient
from optuna.storages import get_storage
from optuna.storages._grpc.server import make_server
from optuna.trial import TrialState

from ogls.sweep import attempts, storage

HERE = Path(__file__).parent
WORKER = """import sys
from test_study import STUB, main, only
main(only(*({"x": i / 10, "does": "fine"} for i in range(8))), sys.argv[1:], script=STUB)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def proxy(place: Path) -> Iterator[str]:
    port = free_port()
    server = make_server(get_storage(f"sqlite:///{place}/sweeps.db"), "127.0.0.1", port)
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:Heartbeat of storage")
def test_a_dead_worker_behind_a_proxy_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna's own proxy has no heartbeat."""
    with proxy(tmp_path) as url:
        shared = storage.open_storage(url, attempts.requeue_killed)
        study = optuna.create_study(storage=shared, study_name="s", direction="maximize")
        lost = study.ask()
        lost.suggest_float("x", 0.0, 1.0)
        assert isinstance(shared, storage.HeartbeatProxy)
        shared.record_heartbeat(lost._trial_id)
        optuna.storages.fail_stale_trials(study)
        assert study.trials[0].state == TrialState.RUNNING
        monkeypatch.setattr(storage, "GRACE", 0.05)
        time.sleep(0.1)
        shared.record_heartbeat(lost._trial_id)
        optuna.storages.fail_stale_trials(study)
        assert study.trials[0].state == TrialState.RUNNING, "it has shown a sign of life"
        time.sleep(0.1)
        optuna.storages.fail_stale_trials(study)
        assert [trial.state.name for trial in study.trials] == ["FAIL", "WAITING"]
        assert study.trials[1].params == study.trials[0].params
        assert attempts.original(study.trials[1]) == 0
        unseen = study.ask()  # as of a worker that has the database itself: Optuna keeps its beats elsewhere
        for _ in range(2):
            optuna.storages.fail_stale_trials(study)
            time.sleep(0.1)
        assert study.trials[unseen.number].state == TrialState.RUNNING
    shared.record_heartbeat(unseen._trial_id)  # the proxy is away: the thread that calls this lives on


@contextmanager
def mlflow_server(place: Path, port: int, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    folders = ["--backend-store-uri", f"sqlite:///{place}/mlflow.db", "--artifacts-destination", f"{place}/files"]
    server = subprocess.Popen([*command, *folders], cwd=place, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 280
        while time.monotonic() < deadline:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture
def environment() -> dict[str, str]:
    """Without MLflow's dozen processes for jobs, which nothing here needs."""
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return {**os.environ, "PYTHONPATH": str(HERE), **settings}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_two_workers_share_a_study(tmp_path: Path, environment: dict[str, str]) -> None:
    port = free_port()
    with mlflow_server(tmp_path, port, environment):
        with proxy(tmp_path) as url:
            given = ["--n-trials", "8", "--storage", url, "--tracking-uri", f"http://127.0.0.1:{port}"]
            arguments = [sys.executable, "-c", WORKER, *given, "--", "--seconds", "0.5"]
            workers = []
            for name in ("one", "two"):
                (tmp_path / name).mkdir()
                workers.append(subprocess.Popen(arguments, cwd=tmp_path / name, env=environment))
            assert [worker.wait() for worker in workers] == [0, 0]
        study = optuna.load_study(study_name="stub", storage=f"sqlite:///{tmp_path}/sweeps.db")
        assert len(attempts.latest(study)) in (8, 9), "at most one too many where both began one at once"
        assert all(trial.state.is_finished() for trial in study.trials)
        made = [(tmp_path / name / "steps.txt").read_text().splitlines() for name in ("one", "two")]
        assert all(made), "both took part"
        assert max(Counter(made[0] + made[1]).values()) == 1, "no run was made by both"
        client = MlflowClient(f"http://127.0.0.1:{port}")
        experiment = client.get_experiment_by_name("sweeps")
        assert experiment is not None
        (parent,) = client.search_runs([experiment.experiment_id], "tags.method = 'sweep'")
        assert parent.info.status == "FINISHED"
        assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"plots.html", "trials.csv"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_server_that_leaves_in_mid_study(tmp_path: Path, environment: dict[str, str]) -> None:
    """Costs the study nothing; the same command, once the server is back, gives MLflow what the study came to."""
    port = free_port()
    given = ["--n-trials", "8", "--tracking-uri", f"http://127.0.0.1:{port}"]
    arguments = [sys.executable, "-c", WORKER, *given, "--", "--seconds", "0.5"]
    with mlflow_server(tmp_path, port, environment) as server:
        worker = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        made = tmp_path / "steps.txt"
        while not made.exists() or len(made.read_text().splitlines()) < 10:
            time.sleep(0.1)
        os.killpg(server.pid, signal.SIGKILL)
        told, _ = worker.communicate()
    assert worker.returncode == 0
    assert "MLflow lacks" in told
    study = optuna.load_study(study_name="stub", storage=f"sqlite:///{tmp_path}/sweeps.db")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 8
    steps = made.read_text()
    with mlflow_server(tmp_path, port, environment):
        subprocess.run(arguments, cwd=tmp_path, env=environment, check=True)
        client = MlflowClient(f"http://127.0.0.1:{port}")
        experiment = client.get_experiment_by_name("sweeps")
        assert experiment is not None
        (parent,) = client.search_runs([experiment.experiment_id], "tags.method = 'sweep'")
        assert parent.info.status == "FINISHED"
        assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"plots.html", "trials.csv"}
        values = client.get_metric_history(parent.info.run_id, "trial/accuracy")
        assert sorted({value.step for value in values}) == list(range(8))
    assert made.read_text() == steps, "no run was made again"
