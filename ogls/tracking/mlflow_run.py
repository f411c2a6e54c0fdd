"""One run in MLflow is written to by a thread that may wait for the server.

Every method may also raise; the outbox, which calls them, counts what is lost.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ogls.tracking.pages import VIEW, VIEW_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

FOLDER = "folder"  # tag: name of the run's folder, by which a run is found again; names of runs may be alike
COMMAND = "command"  # tag: fit, validate, test or predict
_PARAM_LIMIT = 250  # MLflow cuts parameters; the whole configuration is an artifact
_TABLES, _TABLES_LIMIT = "mlflow.loggedArtifacts", 100  # a tag holds 8,000 characters
_CLOCKS = ("time/", "speed/")  # what a step that is made again gives anew each time
_QUIET = ("alembic", "mlflow.store", "mlflow.system_metrics", "mlflow.utils", "urllib3.connectionpool")


class MLflowRun:
    """An MLflow run is begun, or continued, at its first use.

    Args:
        uri: address of the tracking store
        experiment: name of the experiment, which is made where it does not exist
        name: name of the run
        tags: tags of the run
        system_metrics: whether MLflow's own monitor measures the machine
    """

    def __init__(self, uri: str, experiment: str, name: str, tags: dict[str, str], system_metrics: bool) -> None:
        self.uri, self.experiment, self.name, self.tags = uri, experiment, name, tags
        self.system_metrics = system_metrics
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.resumed = False  # continue the run of this id, or of this name where the id is not known
        self.began = time.time()  # seconds; MLflow may hear of the run much later
        self._known: dict[tuple[str, int], float] = {}  # metrics of a continued run, by name and step
        self._client: MlflowClient | None = None
        self._monitor: SystemMetricsMonitor | None = None
        if uri.startswith("http"):  # MLflow asks IPython at each request whether Databricks runs
            _load_ipython()

    @property
    def identity(self) -> dict[str, Any]:
        """Returns what is needed to make this run in another store."""
        return {"experiment": self.experiment, "name": self.name, "tags": self.tags}

    def open(self) -> tuple[MlflowClient, str]:
        """Returns the client and the run's id; the first call begins or continues the run."""
        if self._client is not None and self.run_id is not None:
            return self._client, self.run_id
        for name, value in {"HTTP_REQUEST_TIMEOUT": "10", "HTTP_REQUEST_MAX_RETRIES": "2"}.items():
            os.environ.setdefault(f"MLFLOW_{name}", value)  # MLflow's own: 120 s, seven times
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the run's end prints addresses itself
        for name in _QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)  # failures are counted and reported at the end
        from mlflow import MlflowClient
        from mlflow.tracking.context.default_context import DefaultRunContext
        from mlflow.tracking.context.git_context import GitRunContext

        with self.alone():
            client = MlflowClient(self.uri)
            self.experiment_id = experiment_id = self._experiment_id(client)
        if self.resumed and self.run_id is None:
            named = client.search_runs([experiment_id], f"tags.{FOLDER} = '{self.tags[FOLDER]}'", max_results=1)
            self.run_id = named[0].info.run_id if named else None
        if self.run_id is None:
            # MLflow's `resolve_tags` would import IPython here.
            tags = DefaultRunContext().tags() | GitRunContext().tags() | self.tags
            began = int(self.began * 1000)
            run = client.create_run(experiment_id, start_time=began, tags=tags, run_name=self.name)
            self.run_id = run.info.run_id
        else:
            client.update_run(self.run_id, status="RUNNING")
        if self.resumed:
            self._known = _histories(client, self.run_id, client.get_run(self.run_id).data.metrics)
        self._client = client
        if self.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
            self._monitor.start()
        return client, self.run_id

    def alone(self) -> AbstractContextManager[object]:
        """Returns a lock on a local database: two runs that make the same one at once would break each other's work."""
        if not self.uri.startswith("sqlite:///"):
            return nullcontext()
        return FileLock(f"{self.uri.removeprefix('sqlite:///')}.lock", timeout=300)

    def _experiment_id(self, client: MlflowClient) -> str:
        known = client.get_experiment_by_name(self.experiment)
        if known is not None and known.lifecycle_stage == "deleted":
            command = f"MLFLOW_TRACKING_URI={self.uri} mlflow experiments restore -x {known.experiment_id}"
            raise ValueError(
                f"the experiment {self.experiment!r} was deleted in MLflow: bring it back by `{command}`, or give "
                "another trainer.logger.init_args.experiment"
            )
        if known is not None:
            return known.experiment_id
        local = Path("mlartifacts").resolve().as_uri() if self.uri.startswith("sqlite") else None
        return client.create_experiment(self.experiment, artifact_location=local)

    def metrics(self, row: Mapping[str, float], step: int, seconds: float) -> None:
        """Logs the metrics of one step that were measured at `seconds` since 1970.

        A continued run makes steps again that came after its checkpoint. What MLflow has of them already it is not told
        twice, unless it came out otherwise.
        """
        from mlflow.entities import Metric

        client, run_id = self.open()
        news = _news(row, step, self._known)
        if news:
            client.log_batch(run_id, metrics=[Metric(name, v, int(seconds * 1000), step) for name, v in news.items()])

    def add(self, rows: Sequence[Mapping[str, float]]) -> int:
        """Logs what the run lacks of these rows, each with ``step`` and ``time``; returns how many rows lacked any."""
        lacking = self.missing(rows)
        for row in lacking:
            metrics = {name: value for name, value in row.items() if name not in ("step", "time")}
            self.metrics(metrics, int(row["step"]), row["time"])
        return len(lacking)

    def missing(self, rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """Returns the rows without the metrics that the run has already; every row has ``step`` and ``time``."""
        client, run_id = self.open()
        names = {name for row in rows for name in row} - {"step", "time"}
        known = self._known if self.resumed else _histories(client, run_id, names)
        lacking = []
        for row in rows:
            told = {name: value for name, value in row.items() if name not in ("step", "time")}
            if new := _news(told, int(row["step"]), known):
                lacking.append({"step": row["step"], "time": row["time"], **new})
        return lacking

    def params(self, values: Mapping[str, Any]) -> None:
        """Logs parameters. They are immutable, so new values in a continued run go into the tag ``changed``."""
        from mlflow.entities import Param

        client, run_id = self.open()
        known = client.get_run(run_id).data.params
        texts = {name: str(value)[:_PARAM_LIMIT] for name, value in values.items()}
        new = [Param(name, text) for name, text in texts.items() if name not in known]
        for start in range(0, len(new), 100):  # MLflow takes 100 at a time
            client.log_batch(run_id, params=new[start : start + 100])
        changed = {name: text for name, text in texts.items() if known.get(name, text) != text}
        if changed:
            client.set_tag(run_id, "changed", json.dumps(changed)[:5000])

    def data(self, described: Mapping[str, Mapping[str, Any]]) -> None:
        """Logs each split as a data set of the run, and all of them as `data.json`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        client, run_id = self.open()
        inputs = []
        for name, split in described.items():
            left_out = {"dropped": split["dropped"]} if split["dropped"] else {}
            size = json.dumps({"num_rows": split["problems"], **left_out})
            data = Dataset(name, split["digest"], source_type="code", source=split["source"], profile=size)
            inputs.append(DatasetInput(data, [InputTag("mlflow.data.context", name)]))
        client.log_inputs(run_id, datasets=inputs)
        client.log_dict(run_id, dict(described), "data.json")

    def describe(self, text: str) -> None:
        """Sets the description that the run's page shows, in Markdown."""
        client, run_id = self.open()
        client.set_tag(run_id, "mlflow.note.content", text)

    def show(self, view: Mapping[str, Any], key: str = VIEW) -> None:
        """Keeps by a key what the page of the experiment's runs shows first; see `ogls.tracking.pages.view`."""
        client, _ = self.open()
        assert self.experiment_id is not None
        tag, text = f"{VIEW_TAG}{key}", json.dumps(view)
        known = client.get_experiment(self.experiment_id).tags.get(tag)
        if known != text:
            client.set_experiment_tag(self.experiment_id, tag, text)

    def text(self, text: str, file: str) -> None:
        """Logs a text as the artifact `file`."""
        client, run_id = self.open()
        client.log_text(run_id, text, file)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], file: str) -> None:
        """Logs a table in MLflow's format, with the tag by which MLflow's pages find the newest tables."""
        client, run_id = self.open()
        client.log_dict(run_id, {"columns": list(columns), "data": [list(row) for row in rows]}, file)
        new = {"path": file, "type": "table"}
        shown = [table for table in json.loads(client.get_run(run_id).data.tags.get(_TABLES, "[]")) if table != new]
        client.set_tag(run_id, _TABLES, json.dumps([*shown[1 - _TABLES_LIMIT :], new]))

    def folder(self, folder: Path, name: str) -> None:
        """Logs the files of a folder as artifacts in the folder `name`."""
        client, run_id = self.open()
        client.log_artifacts(run_id, str(folder), name)

    def end(self, state: str, seconds: float | None = None) -> None:
        """Ends the run as FINISHED, FAILED or KILLED, now or at `seconds` since 1970.

        A later call of any method continues the run.
        """
        client, run_id = self.open()
        if self._monitor is not None:
            self._monitor.finish()
        client.set_terminated(run_id, state, None if seconds is None else int(seconds * 1000))
        self._client = self._monitor = None


def _load_ipython() -> None:
    """Imports IPython, where it is installed, before the outbox's thread does: matplotlib would find half of it."""
    with suppress(ImportError):
        import IPython  # noqa: F401


def _histories(client: MlflowClient, run_id: str, names: Iterable[str]) -> dict[tuple[str, int], float]:
    """Returns by name and step the value of each metric that was told last."""
    histories = ((name, client.get_metric_history(run_id, name)) for name in names if not name.startswith("system/"))
    return {(name, metric.step): metric.value for name, history in histories for metric in history}


def _news(row: Mapping[str, float], step: int, known: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Returns the metrics of a step that are not known, or have another value and are not a clock's."""

    def told(name: str, value: float) -> bool:
        before = known.get((name, step))
        same = before == value or (before is not None and math.isnan(before) and math.isnan(value))
        return same or (before is not None and name.startswith(_CLOCKS))

    return {name: value for name, value in row.items() if not told(name, value)}
