"""Pictures of MLflow's pages for the docs, of runs that this script makes first: seven minutes of two cores.

python analysis/screenshots.py --folder FOLDER     # a second call takes the runs that are there, and new pictures
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from browser import Browser
from mlflow import MlflowClient
from mlflow.entities import Run

from ogls.cli import build
from ogls.tracking.pages import page_of_comparison, page_of_run, page_of_runs, page_of_traces

ROOT = Path(__file__).resolve().parents[1]
STORE = "sqlite:///mlflow.db"
PORT = 5055
SHORT = {"steps_per_epoch": 2, "problems_per_step": 8, "evaluation": {"samples": 4, "sampling": {"max_tokens": 48}}}
WORDS = (  # what MLflow shows a new visitor: said to have been seen
    ("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true"),
    ("mlflow.assistant.panelOpen_v1", "false"),
    ("mlflow.detectIssues.guidanceShown_v1", "true"),
)
HIDE = "document.querySelectorAll('[data-component-id*=\"assistant\"]').forEach(e => e.style.visibility = 'hidden')"


def make_runs(sweeps: bool) -> None:
    """Makes two methods with two seeds each, on a lab of few steps, and on request a sweep of six trials."""
    lab = yaml.safe_load((ROOT / "experiments" / "lab.yaml").read_text())
    lab["trainer"]["max_epochs"], lab["data"]["val"]["init_args"]["size"] = 3, 24
    lab["data"] |= SHORT
    Path("short.yaml").write_text(yaml.safe_dump(lab))
    for method in ([], ["--config", "opsd.yaml"]):
        for seed in ("0", "1"):
            own = ["--seed_everything", seed, "--trainer.logger.init_args.register", "lab-student"]
            sys.argv = ["experiments/run.py", "fit", "--config", "short.yaml", *method, *own]
            build()
    if sweeps:
        sweep = [sys.executable, str(ROOT / "sweeps" / "steer_alpha.py"), "--study", "alpha", "--n-trials", "6"]
        subprocess.run([*sweep, "--config", str(Path("short.yaml").resolve())], check=True)


@contextmanager
def server() -> Iterator[str]:
    """Serves the database, and gives the address."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", STORE, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(PORT)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    place = f"http://127.0.0.1:{PORT}/"
    try:
        while process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"{place}health").close()
                break
            time.sleep(0.5)
        yield place
    finally:
        process.terminate()
        process.wait()


def take(client: MlflowClient, place: str, to: Path) -> None:
    """Takes all pictures."""
    (lab,) = client.search_experiments(filter_string="name = 'lab'")
    number = lab.experiment_id
    runs = client.search_runs([number], "attributes.status = 'FINISHED'")
    plain = [run for run in runs if "seed" in run.data.tags]
    traced = plain[-1]
    (model,) = client.search_logged_models([number], f"source_run_id = '{traced.info.run_id}'")
    pages = {
        "list": page_of_runs(number).replace("compareRunsMode=CHART", "compareRunsMode=TABLE"),
        "charts": page_of_runs(number),
        "run": page_of_run(number, traced.info.run_id),
        "compare": page_of_comparison([number], [run.info.run_id for run in plain]),
        "traces": page_of_traces(number, traced.info.run_id),
        "trace": f"#/experiments/{number}/traces?selectedEvaluationId={_taught(client, number, traced)}",
        "model": f"#/experiments/{number}/models/{model.model_id}?workflowType=machine_learning",
        "prompt": f"#/experiments/{number}/prompts/ogls.view.attempt",
    }
    for sweeps in client.search_experiments(filter_string="name = 'sweeps'"):
        pages["sweep"] = page_of_runs(sweeps.experiment_id, "study-alpha")
    with Browser(1500, 900) as browser:
        browser.open(place)
        for key, value in WORDS:
            browser.run(f"localStorage.setItem('{key}', '{value}')")
        for name, page in pages.items():
            browser.open(place + page, "Run Name" if name == "list" else "")
            if name == "trace":
                browser.click("teach")
            browser.run(HIDE)
            browser.picture(to / f"mlflow_{name}.png")
            print(to / f"mlflow_{name}.png", flush=True)


def _taught(client: MlflowClient, number: str, run: Run) -> str:
    """Returns the id of a trace in which the teacher read something."""
    asked = f"request_metadata.`mlflow.sourceRun` = '{run.info.run_id}'"
    traces = client.search_traces(locations=[number], filter_string=asked, max_results=200)
    return next(trace.info.trace_id for trace in traces if any(span.name == "teach" for span in trace.data.spans))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the runs, which are made where missing")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "pictures", help="default: %(default)s")
    parser.add_argument("--sweep", action=argparse.BooleanOptionalAction, default=True, help="a sweep, too")
    given = parser.parse_args()
    given.folder, given.to = given.folder.resolve(), given.to.resolve()
    given.folder.mkdir(parents=True, exist_ok=True)
    given.to.mkdir(parents=True, exist_ok=True)
    os.chdir(given.folder)
    if not Path("mlflow.db").exists():
        make_runs(given.sweep)
    with server() as place:
        take(MlflowClient(STORE), place, given.to)
