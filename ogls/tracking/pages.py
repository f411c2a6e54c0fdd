"""Addresses of MLflow's pages, and what its page of runs shows first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` answers
VIEW = "ogls"  # key of the view in addresses
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"  # of an experiment; MLflow's own way to share a view
_ACCURACY, _TRAINING = "Accuracy", "Training"


def address(tracking_uri: str, page: str) -> str:
    """Returns the address of a page on the tracking server, or on the one that `mlflow ui` starts."""
    return f"{LOCAL if tracking_uri.startswith('sqlite') else tracking_uri.rstrip('/')}/{page}"


def page_of_run(experiment_id: str, run_id: str) -> str:
    """Returns the page of one run, with its description, parameters, metrics and traces."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def page_of_traces(experiment_id: str, run_id: str) -> str:
    """Returns the page of a run's traces, those of each problem together."""
    return f"#/experiments/{experiment_id}/runs/{run_id}/traces?workflowType=machine_learning"


def page_of_runs(experiment_id: str) -> str:
    """Returns the page of an experiment's runs, with the charts and columns of `view`."""
    how = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={VIEW}"
    return f"#/experiments/{experiment_id}/runs?{how}"


def page_of_comparison(experiment_ids: Iterable[str], run_ids: Iterable[str]) -> str:
    """Returns the page that compares runs: parallel coordinates over the parameters that differ."""
    runs, experiments = json.dumps(list(run_ids)), json.dumps(sorted(set(experiment_ids)))
    return f"#/compare-runs?runs={runs}&experiments={experiments}".replace('"', "%22").replace(" ", "")


def view(accuracies: Sequence[str]) -> str:
    """Returns what the page of runs shows first, as MLflow keeps a shared view.

    Charts of accuracy come before those of training, and the list has columns for method, seed and accuracy.

    Args:
        accuracies: names of the metrics of accuracy, that of a whole validation first: ``val/avg_at_4``
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
    columns = ["attributes.`Created`", "attributes.`Duration`", "params.`method`", "params.`seed`"]
    columns += [f"metrics.`{name}`" for name in (final, f"{final}_low", f"{final}_high")]
    return json.dumps(
        {
            **{"searchFilter": "", "orderByKey": "attributes.start_time", "orderByAsc": False, "startTime": "ALL"},
            **{"lifecycleFilter": "Active", "modelVersionFilter": "All Runs", "datasetsFilter": []},
            **{"selectedColumns": columns, "compareRunCharts": charts, "compareRunSections": sections},
            **{"isAccordionReordered": True, "hideEmptyCharts": True, "runListHidden": False, "viewMaximized": False},
        }
    )
