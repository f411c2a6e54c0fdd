"""Reading MLflow: the runs that are asked for, their metrics by step, their accuracy by problem."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from mlflow import MlflowClient

from ogls.tracking.pages import address, page_of_comparison


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that say which runs."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db", help="default: %(default)s")
    parser.add_argument("--experiment", default="ogls", help="default: %(default)s")
    parser.add_argument("--runs", nargs="+", default=[], metavar="ID", help="these runs instead of an experiment's")
    parser.add_argument("--filter", default="", help="as MLflow's search takes it: \"tags.method LIKE 'OPSD%%'\"")
    return parser


def read(client: MlflowClient, experiment: str, runs: Sequence[str], where: str, metric: str) -> pd.DataFrame:
    """Returns one row per value: method, seed, run, step, value, low, high (nan where no interval was logged).

    The method is what the run's tag of this name says: the name that follows from the method's choices, or what was
    typed where the run was made before names were derived. Of an experiment only runs that came to their end count;
    others have to be named.

    Raises:
        ValueError: no such experiment, or no run with this metric.
    """
    if runs:
        chosen = [client.get_run(run) for run in runs]
    else:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise ValueError(f"there is no experiment {experiment!r}")
        there = client.search_runs([found.experiment_id], where, max_results=1000)
        chosen = []
        for run in there:
            if run.info.status == "FINISHED":
                chosen.append(run)
            else:
                print(f"left out: {run.info.run_name}, {run.info.status.lower()}", file=sys.stderr)
    rows = []
    for run in chosen:
        named = {**run.data.params, **run.data.tags}  # MLflow cuts parameters that are as long as some names
        values, lows, highs = (
            {m.step: m.value for m in client.get_metric_history(run.info.run_id, metric + end)}
            for end in ("", "_low", "_high")
        )
        for step, value in sorted(values.items()):
            rows.append(
                {
                    "method": named.get("method", "unnamed"),
                    "seed": int(named.get("seed", 0)),
                    "run": run.info.run_id,
                    "step": step,
                    "value": value,
                    "low": lows.get(step, math.nan),
                    "high": highs.get(step, math.nan),
                }
            )
    if not rows:
        raise ValueError(f"none of {len(chosen)} runs has the metric {metric!r}")
    return pd.DataFrame(rows)


def comparison(client: MlflowClient, tracking_uri: str, runs: Sequence[str]) -> str:
    """Returns the address of MLflow's page that compares runs."""
    experiments = {client.get_run(run).info.experiment_id for run in runs}
    return address(tracking_uri, page_of_comparison(experiments, runs))


def of_preset(name: str, asked: str) -> bool:
    """Returns whether a method of this name was asked for, by the name itself or by its preset: OPSD for OPSD[...]."""
    return asked in (name, name.partition("[")[0])


def accuracy_by_problem(client: MlflowClient, run: str, step: int) -> dict[str, float]:
    """Returns the share of right rollouts of each held-out problem at the validation after `step`.

    It is empty where none was logged.
    """
    file = f"problems/step-{step:06d}.json"
    if file not in {found.path for found in client.list_artifacts(run, "problems")}:
        return {}
    with TemporaryDirectory() as folder:
        return json.loads(Path(client.download_artifacts(run, file, folder)).read_text(encoding="utf-8"))
