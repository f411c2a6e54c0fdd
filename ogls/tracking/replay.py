"""A run whose tracking server was away is added to MLflow from its folder.

    python -m ogls.tracking.replay runs/NAME [sqlite:///mlflow.db]

What MLflow has already is not added again, so a run may be replayed any number of times. With it come its traces, its
prompts and its best model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ogls.tracking import best, prompts, traces
from ogls.tracking.address import check_tracking_uri
from ogls.tracking.files import BEST, CONFIG, DESCRIPTION, METRICS, PROBLEMS, PROMPTS, ROLLOUTS, read_rows
from ogls.tracking.mlflow_run import MLflowRun


def replay(folder: Path, tracking_uri: str) -> int:
    """Adds a run to MLflow from its folder, and returns the number of rows of metrics that were missing there.

    The run of this name is continued, or made where there is none.

    Raises:
        ValueError: the folder is not a run's.
    """
    for name in (METRICS, DESCRIPTION):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no run's folder: {name} is missing")
    told = json.loads((folder / DESCRIPTION).read_text())
    run = MLflowRun(tracking_uri, told["experiment"], told["name"], told["tags"], system_metrics=False)
    run.resumed = True
    known = read_rows(folder / METRICS)
    if known:
        run.began = known[0]["time"]
    run.params(told["params"])
    if (folder / CONFIG).is_file():
        run.text((folder / CONFIG).read_text(), CONFIG)
    for file in sorted((folder / PROBLEMS).glob("*.json")):
        run.text(file.read_text(), f"{PROBLEMS}/{file.name}")
    added = run.add(known)
    if (folder / ROLLOUTS).is_file():
        traces.write(run, read_rows(folder / ROLLOUTS))
    if (folder / PROMPTS).is_file():
        prompts.write(run, json.loads((folder / PROMPTS).read_text()))
    if (folder / BEST).is_file():
        found = json.loads((folder / BEST).read_text())
        best.write(run, found, told["params"], found["register"])
    finished = any(name.startswith("final/") for row in known for name in row)
    run.end("FINISHED" if finished else "KILLED", known[-1]["time"] if known else None)
    return added


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the run, such as runs/NAME")
    store = "sqlite:///file or the address of an MLflow server (default: %(default)s)"
    parser.add_argument("tracking_uri", nargs="?", default="sqlite:///mlflow.db", help=store)
    given = parser.parse_args()
    try:
        check_tracking_uri(given.tracking_uri)
        print(f"{replay(given.folder, given.tracking_uri)} rows added to {given.tracking_uri}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
