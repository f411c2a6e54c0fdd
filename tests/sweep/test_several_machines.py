"""Workers that share a study: behind a proxy on loopback, and with PostgreSQL from two networks; one MLflow server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient
from optuna.storages import RDBStorage
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
    """`sweeps/proxy.py` itself, whose storage lets no two workers take the same trial."""
    command = [sys.executable, str(HERE.parents[1] / "sweeps" / "proxy.py"), "--port", str(free_port())]
    command += ["--storage", f"sqlite:///{place}/sweeps.db"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[1]
    finally:
        server.kill()
        server.communicate()


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


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:Heartbeat of storage")
def test_no_two_workers_take_the_same_trial(tmp_path: Path) -> None:
    """Without the lock of `open_storage`, two threads take some five of sixty trials twice."""
    shared = storage.open_storage(f"sqlite:///{tmp_path}/sweeps.db", attempts.requeue_killed)
    study = optuna.create_study(storage=shared, study_name="s")
    for _ in range(60):
        study.enqueue_trial({})
    together, taken = threading.Barrier(2), []

    def work() -> None:
        own = optuna.load_study(study_name="s", storage=shared)
        for _ in range(30):
            together.wait(60)
            taken.append(own.ask().number)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(taken) == list(range(60))


@contextmanager
def mlflow_server(
    place: Path, port: int, environment: dict[str, str], *further: str, host: str = "127.0.0.1", store: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *further]
    store = store or f"sqlite:///{place}/mlflow.db"
    folders = ["--host", host, "--backend-store-uri", store, "--artifacts-destination", f"{place}/files"]
    server = subprocess.Popen([*command, *folders], cwd=place, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 280
        while time.monotonic() < deadline:
            with socket.socket() as tried:
                if tried.connect_ex((host, port)) == 0:
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


# ---- two networks ----

HOST = "10.77.0.1"
IMPATIENT = "from ogls.sweep import storage\nstorage.HEARTBEAT, storage.GRACE = 1, 5\n"


def carried_out(*command: str, **options: object) -> None:
    subprocess.run(command, check=True, capture_output=True, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]


@pytest.fixture
def networks() -> Iterator[list[str]]:
    """Two network namespaces, each with a cable to HOST; they have no way to another one's loopback."""
    names = [f"ogls-test-{number}" for number in range(2)]
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here")
    try:
        carried_out("ip", "netns", "add", names[1])
        carried_out("ip", "link", "add", "ogls-test", "type", "bridge")
        carried_out("ip", "address", "add", f"{HOST}/24", "dev", "ogls-test")
        carried_out("ip", "link", "set", "ogls-test", "up")
        for number, name in enumerate(names):
            cable = ("ip", "link", "add", f"ogls-t{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            carried_out(*cable)
            carried_out("ip", "link", "set", f"ogls-t{number}", "master", "ogls-test", "up")
            inside = ("ip", "-n", name)
            carried_out(*inside, "address", "add", f"10.77.0.{number + 2}/24", "dev", "eth0")
            carried_out(*inside, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", "ogls-test"], capture_output=True)


@contextmanager
def postgres(place: Path) -> Iterator[str]:
    """Address of a server with the databases `sweeps` and `mlflow`, which HOST's network may use."""
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), Path(shutil.which("initdb") or "/nowhere").parent]
    programs = next((folder for folder in folders if (folder / "initdb").is_file()), None)
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is not installed")
    data, port = place / "data", free_port()
    data.mkdir()
    shutil.chown(data, "postgres")
    for folder in (place, *place.parents):  # pytest's are for their owner alone
        if folder != Path("/") and folder.owner() == "root" and folder != Path("/tmp"):
            folder.chmod(0o755)
    as_user = {"user": "postgres", "cwd": data}
    carried_out(str(programs / "initdb"), "-D", str(data), "--auth", "trust", "--username", "ogls", **as_user)
    with (data / "pg_hba.conf").open("a") as file:
        file.write("host all all 10.77.0.0/24 trust\n")
    server = subprocess.Popen(
        [programs / "postgres", "-D", data, "-h", HOST, "-p", str(port), "-k", data],
        user="postgres",
        cwd=data,
        stderr=subprocess.DEVNULL,
    )
    try:
        for name in ("sweeps", "mlflow"):
            for _ in range(100):
                command = [programs / "createdb", "-h", HOST, "-p", str(port), "-U", "ogls", name]
                if subprocess.run(command, capture_output=True).returncode == 0:
                    break
                time.sleep(0.5)
        yield f"postgresql+psycopg://ogls@{HOST}:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_workers_of_two_networks_share_postgres_and_one_is_killed(
    tmp_path: Path, environment: dict[str, str], networks: list[str]
) -> None:
    """Its trial is made again by the other, and MLflow, which has a database of the same server, has all runs."""
    port = free_port()
    with postgres(tmp_path) as url:
        own = {**environment, "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:{port}"}
        with mlflow_server(tmp_path, port, own, host=HOST, store=f"{url}/mlflow"):
            given = ["--n-trials", "8", "--storage", f"{url}/sweeps", "--tracking-uri", f"http://{HOST}:{port}"]
            program = [sys.executable, "-c", IMPATIENT + WORKER, *given, "--", "--seconds", "1"]
            workers = []
            for name in networks:
                (tmp_path / name).mkdir()
                command = ["ip", "netns", "exec", name, *program]
                workers.append(subprocess.Popen(command, cwd=tmp_path / name, env=environment, start_new_session=True))
            made = [tmp_path / name / "steps.txt" for name in networks]
            while not all(file.exists() and len(file.read_text().splitlines()) > 2 for file in made):
                assert [worker.poll() for worker in workers] == [None, None]
                time.sleep(0.1)
            os.killpg(workers[1].pid, signal.SIGKILL)
            assert [worker.wait() for worker in reversed(workers)] == [-9, 0]
            client = MlflowClient(f"http://{HOST}:{port}")
            experiment = client.get_experiment_by_name("sweeps")
            assert experiment is not None
            (parent,) = client.search_runs([experiment.experiment_id], "tags.method = 'sweep'")
            assert parent.info.status == "FINISHED"
        database = RDBStorage(f"{url}/sweeps")
        study = optuna.load_study(study_name="stub", storage=database)
        newest = attempts.latest(study)
        assert len(newest) in (8, 9), "at most one too many where both began one at once"
        assert {trial.state for trial in newest} <= {TrialState.COMPLETE, TrialState.PRUNED}
        assert len(study.trials) > len(newest), "what the killed one had begun was queued again"
        database.remove_session()
        database.engine.dispose()
