"""Workers that share a study: two processes, one gRPC proxy before Optuna's database, one MLflow server; loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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
        shared = storage.open_storage(url, attempts.died)
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_two_workers_share_a_study(tmp_path: Path) -> None:
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(HERE), "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # a dozen processes that nothing here needs
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    folders = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", f"{tmp_path}/files"]
    server = subprocess.Popen([*command, *folders], cwd=tmp_path, env=environment)
    try:
        deadline = time.monotonic() + 280
        while time.monotonic() < deadline:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
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
    finally:
        server.terminate()
        server.wait()
