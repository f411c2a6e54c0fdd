"""Reading MLflow: the runs that are asked for, their metrics by step, their accuracy by problem."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from ogls.tracking.files import WHOLE
from ogls.tracking.mlflow_run import COMMAND
from ogls.tracking.pages import address, page_of_comparison

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
_SEEDS = ("seed", "seed_everything", "data.seed")


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
    typed where the run was made before names were derived. Settings other than seeds in which runs of a method differ
    follow in parentheses. Of an experiment only trainings that came to their end count, and of several with the same
    settings and seed the last one; others have to be named.

    Raises:
        ValueError: no such experiment or run, no run with this metric, or a filter that MLflow does not understand.
    """
    try:
        chosen = [client.get_run(run) for run in runs] or _finished(client, experiment, where)
    except MlflowException as error:
        raise ValueError(f"expected ids of runs and a filter as MLflow takes them, got: {error.message}") from error
    rows, methods = [], _methods(chosen)
    for run in chosen:
        values, lows, highs = (
            {m.step: m.value for m in client.get_metric_history(run.info.run_id, metric + end)}
            for end in ("", "_low", "_high")
        )
        for step, value in sorted(values.items()):
            rows.append(
                {
                    "method": methods[run.info.run_id],
                    "seed": int(_named(run, "seed") or 0),
                    "run": run.info.run_id,
                    "step": step,
                    "value": value,
                    "low": lows.get(step, math.nan),
                    "high": highs.get(step, math.nan),
                }
            )
    if not rows:
        there = ", ".join(sorted({name for run in chosen for name in run.data.metrics if WHOLE.fullmatch(name)}))
        raise ValueError(
            f"none of {len(chosen)} runs has the metric {metric!r}; of accuracy they have {there or 'none'}"
        )
    return pd.DataFrame(rows)


def _finished(client: MlflowClient, experiment: str, where: str) -> list[Run]:
    """Returns an experiment's trainings that came to their end, and says which of its runs are left out."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(f"there is no experiment {experiment!r}")
    there = client.search_runs([found.experiment_id], where, max_results=1000)
    chosen, known = [], set()
    for run in there:  # the last one comes first
        command, alike = run.data.tags.get(COMMAND, "fit"), (*_settings(run).items(), _named(run, "seed"))
        why = run.info.status.lower() if run.info.status != "FINISHED" else command if command != "fit" else ""
        why = why or ("made again later" if alike in known and run.data.params else "")
        if why:
            print(f"left out: {run.info.run_name}, {why}", file=sys.stderr)
        else:
            chosen.append(run)
            known.add(alike)
    return chosen


def _named(run: Run, name: str) -> str | None:
    """Returns a tag, or else a parameter: MLflow cuts parameters that are as long as some methods' names."""
    return {**run.data.params, **run.data.tags}.get(name)


def _settings(run: Run) -> dict[str, str]:
    """Returns the parameters of a run and its method, but for its seed."""
    params = {name: value for name, value in sorted(run.data.params.items()) if name not in _SEEDS}
    return params | {"method": _named(run, "method") or "unnamed"}


def _methods(runs: Sequence[Run]) -> dict[str, str]:
    """Returns by run what a table calls its method."""
    settings = {run.info.run_id: _settings(run) for run in runs}
    by_method: dict[str, list[str]] = {}
    for run, own in settings.items():
        by_method.setdefault(own["method"], []).append(run)
    found = {}
    for method, alike in by_method.items():
        names = sorted({name for run in alike for name in settings[run]})
        differing = [name for name in names if len({settings[run].get(name) for run in alike}) > 1]
        for run in alike:
            told = ", ".join(f"{name}={settings[run].get(name, 'default')}" for name in differing)
            found[run] = f"{method} ({told})" if told else method
    return found


def comparison(client: MlflowClient, tracking_uri: str, runs: Sequence[str]) -> str:
    """Returns the address of MLflow's page that compares runs."""
    experiments = {client.get_run(run).info.experiment_id for run in runs}
    return address(tracking_uri, page_of_comparison(experiments, runs))


def of_preset(name: str, asked: str) -> bool:
    """Returns whether a method of this name was asked for, by the name itself or by its preset.

    The preset OPSD is that of OPSD[...] and of OPSD (model.learning_rate=1e-05).
    """
    return asked in (name, name.partition(" (")[0].partition("[")[0])


def accuracy_by_problem(client: MlflowClient, run: str, step: int) -> dict[str, float]:
    """Returns the share of right rollouts of each held-out problem at the validation after `step`.

    It is empty where none was logged.
    """
    file = f"problems/step-{step:06d}.json"
    if file not in {found.path for found in client.list_artifacts(run, "problems")}:
        return {}
    with TemporaryDirectory() as folder:
        return json.loads(Path(client.download_artifacts(run, file, folder)).read_text(encoding="utf-8"))
