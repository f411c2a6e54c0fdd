"""Addresses of MLflow's pages, and what its page of runs shows first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` answers
VIEW = "ogls"  # key of the view in addresses
VIEW_TAG = "mlflow.sharedViewState."  # of an experiment, before a view's key; MLflow's own way to share a view
_NAME_WIDTH, _METRIC_WIDTH, _PARAMETER_WIDTH = 270, 135, 180  # pixels; MLflow's own 190 and 100 cut what they show
_TRIALS, _ACCURACY, _TRAINING = "Trials", "Accuracy", "Training"


def address(tracking_uri: str, page: str) -> str:
    """Returns the address of a page on the tracking server, or on the one that `mlflow ui` starts."""
    return f"{LOCAL if tracking_uri.startswith('sqlite') else tracking_uri.rstrip('/')}/{page}"


def page_of_run(experiment_id: str, run_id: str) -> str:
    """Returns the page of one run, with its description, parameters, metrics and traces."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def page_of_traces(experiment_id: str, run_id: str) -> str:
    """Returns the page of a run's traces, those of each problem together."""
    return f"#/experiments/{experiment_id}/runs/{run_id}/traces?workflowType=machine_learning"


def page_of_runs(experiment_id: str, key: str = VIEW) -> str:
    """Returns the page of an experiment's runs, with the charts and columns of the `view` that is kept by this key."""
    how = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={key}"
    return f"#/experiments/{experiment_id}/runs?{how}"


def page_of_comparison(experiment_ids: Iterable[str], run_ids: Iterable[str]) -> str:
    """Returns the page that compares runs: parallel coordinates over the parameters that differ."""
    runs, experiments = json.dumps(list(run_ids)), json.dumps(sorted(set(experiment_ids)))
    return f"#/compare-runs?runs={runs}&experiments={experiments}".replace('"', "%22").replace(" ", "")


def view(accuracies: Sequence[str], parameters: Sequence[str] = ("method", "seed")) -> dict[str, Any]:
    """Returns what the page of runs shows first, as MLflow keeps a shared view.

    Charts of accuracy come before those of training, and the list has columns for accuracy and parameters.

    Args:
        accuracies: names of the metrics of accuracy, that of a whole validation first: ``val/avg_at_4``
        parameters: parameters with a column
    """
    final = "final/" + accuracies[0].partition("/")[2]
    lines = {
        _ACCURACY: [*accuracies, "val/length_mean", "val/truncated_rate"],
        _TRAINING: ["train/loss", "train/accuracy", "train/grad_norm", "train/mixed_groups", "train/length_mean"],
    }
    shared = {"deleted": False, "isGenerated": False}
    bars = {"type": "BAR", "metricKey": final, "metricSectionId": _ACCURACY}
    charts = [{**shared, **bars, "uuid": "ogls-final"}]
    for section, metrics in lines.items():
        for metric in metrics:
            line = {"type": "LINE", "metricKey": metric, "selectedMetricKeys": [metric], "metricSectionId": section}
            axes = {"xAxisKey": "step", "scaleType": "linear", "xAxisScaleType": "linear", "lineSmoothness": 0}
            charts.append({**shared, **line, **axes, "useGlobalXaxisKey": True, "uuid": f"ogls-{metric}"})
    sections = [{"uuid": name, "name": name, "display": True, "isReordered": True} for name in lines]
    columns = {f"metrics.`{name}`": _METRIC_WIDTH for name in (final, f"{final}_low", f"{final}_high")}
    columns |= {f"params.`{name}`": 70 if name == "seed" else _PARAMETER_WIDTH for name in parameters}
    first = {"attributes.`Run Name`": _NAME_WIDTH, "attributes.`Created`": 150, "duration": 80}
    widths = {**first, **columns}
    return {
        **{"searchFilter": "", "orderByKey": "attributes.start_time", "orderByAsc": False, "startTime": "ALL"},
        **{"lifecycleFilter": "Active", "modelVersionFilter": "All Runs", "datasetsFilter": []},
        **{"selectedColumns": ["attributes.`Created`", "attributes.`Duration`", *columns]},
        **{"columnOrder": list(widths), "columnWidths": widths},
        **{"compareRunCharts": charts, "compareRunSections": sections, "isAccordionReordered": True},
        **{"hideEmptyCharts": True, "runListHidden": False, "viewMaximized": False},
    }


def view_of_study(
    study: str, accuracies: Sequence[str], parameters: Sequence[str], lines: Sequence[str]
) -> dict[str, Any]:
    """Returns what the page of a study's trials shows first: the best on top, and a line for each through its values.

    Args:
        study: name of the study, which is a tag of its runs
        accuracies: names of the metrics of accuracy, that of a whole validation first
        parameters: parameters in which the trials differ
        lines: those of them that every trial has, since a run that lacks one would have no line
    """
    shown = view(accuracies, parameters)
    final = "final/" + accuracies[0].partition("/")[2]
    if lines:
        section = {"uuid": _TRIALS, "name": _TRIALS, "display": True, "isReordered": True, "columns": 1}
        chart = {"type": "PARALLEL", "uuid": "ogls-parallel", "metricSectionId": _TRIALS, "deleted": False}
        chart |= {"isGenerated": False, "selectedParams": list(lines), "selectedMetrics": [final], "showAllRuns": True}
        shown["compareRunCharts"].insert(0, chart)
        shown["compareRunSections"].insert(0, section)
    del shown["columnWidths"]["attributes.`Run Name`"]  # names of trials are short
    trials = f"tags.study = '{study}' AND tags.trial LIKE '%'"  # which the study's own run has not
    return {**shown, "searchFilter": trials, "orderByKey": f"metrics.`{final}`"}
