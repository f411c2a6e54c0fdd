"""A study's record is a parent run in MLflow, above the runs of its trials."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from optuna import Study

from ogls.sweep.definition import Settings
from ogls.tracking.files import DESCRIPTION
from ogls.tracking.mlflow_run import COMMAND, MLflowRun
from ogls.tracking.outbox import Outbox
from ogls.tracking.pages import address, page_of_runs, view_of_study
from ogls.tracking.replay import replay

_PATIENCE_LOCAL, _PATIENCE_SERVER = 300.0, 20.0  # seconds to wait for MLflow at beginning and end


class StudyRecord:
    """A study record is the parent run. Its id is kept in the study, so that every worker finds it, on any day.

    All calls go through an outbox: while the server is away, the study loses nothing but entries, which are counted.

    Args:
        settings: options of the sweep's command line
        study: Optuna's study
        created: whether this worker made the study, and so makes the parent run; other workers wait for its id
        about: what the study is, in Markdown: the run's description until `end` tells what came of it
    """

    def __init__(self, settings: Settings, study: Study, created: bool, about: str) -> None:
        self._study, self._key = study, f"mlflow_run:{_identity(settings.tracking_uri)}"
        self._patience = _PATIENCE_LOCAL if settings.tracking_uri.startswith("sqlite") else _PATIENCE_SERVER
        tags = {"method": "sweep", "study": settings.study, COMMAND: "sweep"}
        self._run = MLflowRun(settings.tracking_uri, settings.experiment, settings.study, tags, system_metrics=False)
        self._run.run_id = self._kept() if created else _wait(self._kept, _PATIENCE_SERVER)
        self._box = Outbox()
        self._page = ""  # page of the study's runs, once a trial is complete
        self._about = about
        last = settings.first_seed + settings.seeds - 1
        seeds = str(last) if settings.seeds == 1 else f"{settings.first_seed} to {last}"
        self._put(lambda: self._run.params({**settings.identity, "method": "sweep", "seed": seeds}))
        if created:
            self._put(lambda: self._run.describe(about))
        _wait(lambda: self._run.run_id or self._box.lost, self._patience)

    def _kept(self) -> str | None:
        return self._study.user_attrs.get(self._key)

    def _put(self, call: Callable[[], None]) -> None:
        def after_begin() -> None:
            _, run_id = self._run.open()
            if self._kept() != run_id:
                self._study.set_user_attr(self._key, run_id)
            call()

        self._box.put(after_begin)

    @property
    def run_id(self) -> str | None:
        """Returns the parent run's id; None while MLflow cannot be reached, so that the trials' runs have no parent."""
        return self._run.run_id

    def settle(self, folder: Path, number: int, state: str, outcome: str) -> None:
        """Tells MLflow what became of a trial's run. Entries that MLflow lacks are added from the run's folder.

        Args:
            folder: folder of the run
            number: number of the trial, which becomes a parameter
            state: state of the run in MLflow, which a killed process could not set itself
            outcome: Optuna's word for the outcome, which becomes a tag
        """

        def call() -> None:
            client, parent = self._run.open()
            experiment = client.get_run(parent).info.experiment_id
            where = f"tags.`mlflow.runName` = '{folder.name}'"
            known = client.search_runs([experiment], where)
            if (folder / DESCRIPTION).is_file() and all(run.info.status == "RUNNING" for run in known):
                replay(folder, self._run.uri)
            for run in client.search_runs([experiment], where):
                client.log_param(run.info.run_id, "trial", number)
                client.set_tag(run.info.run_id, "outcome", outcome)
                if run.info.status != state:
                    client.set_terminated(run.info.run_id, state)

        self._put(call)

    def progress(self, values: dict[str, float], step: int, seconds: float) -> None:
        """Logs metrics of the parent run at `seconds` since 1970, unless it has them."""

        def call() -> None:
            for _ in self._run.missing([{**values, "step": step, "time": seconds}]):
                self._run.metrics(values, step, seconds)

        self._put(call)

    def file(self, path: Path) -> None:
        """Logs a file as an artifact of the parent run."""

        def call() -> None:
            client, run_id = self._run.open()
            client.log_artifact(run_id, str(path))

        self._put(call)

    def show(self, accuracies: Sequence[str], parameters: Sequence[str], lines: Sequence[str]) -> None:
        """Sets what the page of the study's runs shows; see `ogls.tracking.pages.view_of_study`."""

        def call() -> None:
            study, key = self._study.study_name, f"study-{self._study.study_name}"
            self._run.show(view_of_study(study, accuracies, parameters, lines), key)
            assert self._run.experiment_id is not None
            self._page = page_of_runs(self._run.experiment_id, key)

        self._put(call)

    def end(self, state: str | None, told: str) -> None:
        """Ends the parent run as FINISHED or KILLED; None leaves it running for other workers.

        Args:
            state: state of the run in MLflow
            told: what came of the study so far, in Markdown
        """

        def describe() -> None:
            first, _, others = told.partition("\n\n")
            link = f" ([side by side]({self._page}))" if self._page else ""
            self._run.describe("\n\n".join(filter(None, [first + link, others, self._about])))

        self._put(describe)
        if state is not None:
            self._put(lambda: self._run.end(state))
        self._box.close(self._patience)
        if self._page:
            print(f"The study's runs side by side: {address(self._run.uri, self._page)}")
        if self._box.lost:
            print(f"MLflow lacks {self._box.lost} entries of the study. {self._box.error}")


def _identity(uri: str) -> str:
    """Returns a short hash that identifies a tracking store.

    A local file is another store on every host. The address itself may hold a password.
    """
    if uri.startswith("sqlite:///"):
        uri = f"{socket.gethostname()}:{uri}"
    return sha256(uri.encode()).hexdigest()[:12]


def _wait(there: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := there()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found
