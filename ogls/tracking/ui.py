"""MLflow's pages are served from a database, after the addresses at which they show runs and charts are printed.

python -m ogls.tracking.ui [sqlite:///mlflow.db] [--port 5000]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ogls.tracking.address import check_tracking_uri
from ogls.tracking.pages import page_of_runs

_HOST = "127.0.0.1"


def addresses(tracking_uri: str, port: int) -> dict[str, str]:
    """Returns by name of each experiment that has runs where its runs and charts are shown; the last used comes first.

    Raises:
        ValueError: the database is not there, or has no runs.
    """
    check_tracking_uri(tracking_uri)
    file = Path(tracking_uri.removeprefix("sqlite:///"))
    if not tracking_uri.startswith("sqlite:///"):
        raise ValueError(f"{tracking_uri} is served already: open its own address")
    if not file.is_file():
        raise ValueError(f"there is no {file} here: a run makes it, as `make fit` does")
    from mlflow import MlflowClient

    client, latest = MlflowClient(tracking_uri), {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id], max_results=1, order_by=["start_time DESC"]):
            latest[experiment.name] = run.info.start_time, page_of_runs(experiment.experiment_id)
    if not latest:
        raise ValueError(f"{file} has no runs yet")
    order = sorted(latest, key=lambda name: latest[name][0], reverse=True)
    return {name: f"http://{_HOST}:{port}/{latest[name][1]}" for name in order}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tracking_uri", nargs="?", default="sqlite:///mlflow.db", help="database (%(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="port on this machine (%(default)s)")
    given = parser.parse_args()
    try:
        for name, address in addresses(given.tracking_uri, given.port).items():
            print(f"{name}: {address}", flush=True)
        print("They open once the server below says that it is running; Ctrl-C ends it.", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", given.tracking_uri]
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.execv(sys.executable, [*command, "--host", _HOST, "--port", str(given.port)])
