"""The best model of a run is a logged model in MLflow, with the validation that chose it and the problems of that.

Its weights are where the run has them and are uploaded no second time: the adapter is the run's artifact
`best_adapter`, which is also what a registered version holds; all weights stay in `checkpoints/best.ckpt`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ogls.tracking.files import ADAPTER, BEST_CHECKPOINT, CHECKPOINTS
from ogls.tracking.mlflow_run import MLflowRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

_STEP = "step"  # tag
_VERSIONS = "mlflow.modelVersions"  # tag by which a model's page links to the registry
_LIMIT = 250  # characters of a parameter


def best_of(rows: Sequence[Mapping[str, Any]], monitor: str) -> dict[str, Any] | None:
    """Returns the row of the best validation in training, of equals the first; None where there is none.

    Args:
        rows: rows of metrics.jsonl
        monitor: metric whose highest value is the best
    """
    judged = [row for row in rows if row["step"] and not math.isnan(row.get(monitor, math.nan))]
    return dict(max(judged, key=lambda row: row[monitor])) if judged else None


def told(row: Mapping[str, Any], monitor: str, digests: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Returns what is kept of the best model in `best.json`.

    Args:
        row: row of metrics.jsonl that `best_of` gives
        monitor: metric that chose it
        digests: digest of the problems of each split
        folder: the run's folder
    """
    metrics = {name: value for name, value in row.items() if name.startswith(("val/", "val_subset/"))}
    own = {"monitor": monitor, "step": row["step"], "time": row["time"], "metrics": metrics, "data": dict(digests)}
    return own | {"adapter": (folder / ADAPTER).is_dir(), "checkpoint": str(folder / CHECKPOINTS / BEST_CHECKPOINT)}


def write(run: MLflowRun, best: Mapping[str, Any], params: Mapping[str, Any], register: str | None) -> None:
    """Writes the best model as a logged model, and as a version of the registered model `register`.

    What is there already is not written again.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    client, run_id = run.open()
    assert run.experiment_id is not None
    model = _written(client, run, run_id, best["step"])
    if model is None:
        name = f"{run.name.replace('[...]', '')} step {best['step']}"
        model = client.create_logged_model(
            run.experiment_id,
            "".join("_" if sign in "/:.%\"'" else sign for sign in name),
            source_run_id=run_id,
            tags={_STEP: str(best["step"]), "monitor": best["monitor"], "mlflow.note.content": _readme(run_id, best)},
            params={name: str(value)[:_LIMIT] for name, value in params.items()},
        )
        at = int(best["time"] * 1000)  # the same as the run's own: there it is no second value
        data = {"dataset_name": "val", "dataset_digest": best["data"].get("val")} if best["data"].get("val") else {}
        told = [
            Metric(name, value, at, best["step"], model_id=model.model_id, run_id=run_id, **data)
            for name, value in best["metrics"].items()
        ]
        for start in range(0, len(told), 500):
            client.log_batch(run_id, metrics=told[start : start + 500])
        with tempfile.TemporaryDirectory() as folder:
            readme = Path(folder) / "README.md"
            readme.write_text(_readme(run_id, best))
            client.log_model_artifact(model.model_id, str(readme))
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, best["step"])])
        client.finalize_logged_model(model.model_id, "READY")
    if register is not None:
        _register(client, register, model, run_id, best)


def _written(client: MlflowClient, run: MLflowRun, run_id: str, step: int) -> LoggedModel | None:
    """Returns the model of this step that is there already; what else the run has is taken away.

    That is a model that is not complete, or that was the best before the run went on.
    """
    assert run.experiment_id is not None
    written = None
    for model in client.search_logged_models([run.experiment_id], f"source_run_id = '{run_id}'"):
        if model.tags.get(_STEP) == str(step) and str(model.status) == "READY":
            written = model
        else:
            client.delete_logged_model(model.model_id)
    return written


def _register(client: MlflowClient, name: str, model: LoggedModel, run_id: str, best: Mapping[str, Any]) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if any(version.tags.get(_STEP) == str(best["step"]) for version in versions):
        return
    # A server takes a place for a version only inside what the version names: its run, or else its model.
    place, whose = model.artifact_location, model.model_id
    if best["adapter"]:
        place, whose = f"{client.get_run(run_id).info.artifact_uri}/{ADAPTER}", None
    told = f"{best['monitor']} {best['metrics'][best['monitor']]:.3f} after step {best['step']}"
    tags = {_STEP: str(best["step"])}
    made = client.create_model_version(name, place, run_id, tags=tags, description=told, model_id=whose)
    client.set_logged_model_tags(model.model_id, {_VERSIONS: json.dumps([{"name": name, "version": made.version}])})


def _readme(run_id: str, best: Mapping[str, Any]) -> str:
    """Returns where the weights are, and how they become a model for other programs."""
    where = f"- adapter: artifact `{ADAPTER}` of run `{run_id}`\n" if best["adapter"] else ""
    return (
        f"Best of its run by {best['monitor']}, {best['metrics'][best['monitor']]:.3f} after step {best['step']}.\n\n"
        f"{where}- checkpoint: `{best['checkpoint']}`\n\n```sh\n"
        f"python experiments/run.py export --ckpt_path {best['checkpoint']} --to FOLDER\n```\n"
    )
