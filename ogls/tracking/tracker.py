"""The tracker is Lightning's logger: it keeps a run's files and tells MLflow."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from ogls.records import Phase
from ogls.system.ranges import within
from ogls.system.run_lock import lock_folder
from ogls.tasks.base import ProblemSource
from ogls.tracking.address import check_tracking_uri
from ogls.tracking.data_told import problems_told
from ogls.tracking.files import (
    BEST,
    CONFIG,
    DESCRIPTION,
    METRICS,
    OF_SET,
    PROBLEMS,
    ROLLOUTS,
    TRACE,
    TRACE_HEAD,
    WHOLE,
    accuracies,
    read_rows,
    read_trace,
    replace_text,
    trace_lines,
    with_interval,
    write_rows,
)
from ogls.tracking.mlflow_run import COMMAND, FOLDER, MLflowRun
from ogls.tracking.names import label, stamp, title
from ogls.tracking.outbox import Outbox
from ogls.tracking.pages import address, page_of_run, page_of_runs, page_of_traces, view

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,199}")
_METRIC_NAME = re.compile(r"[A-Za-z0-9_/.\- ]+")
_PATIENCE_LOCAL, _PATIENCE_SERVER = 300.0, 8.0  # seconds that the end of a run waits for MLflow; a busy disk is slow
ROWS_LIMIT = 100  # rows per table of completions


class Tracker(Logger):
    """Tracker is Lightning's logger for this project: it writes a run's files and logs the run to MLflow.

    Args:
        experiment: name of the MLflow experiment
        run_name: name of the run and of its folder; null makes one from method, seed and time
        folder: folder that holds one folder per run
        tracking_uri: MLflow's store: `sqlite:///file` or the address of a server
        tags: further tags of the run in MLflow
        parent_run_id: id of the MLflow run below which this one is shown
        system_metrics: whether processor, memory, disk, network and GPU are measured every 10 s
        traces: number of rollouts per epoch, and per validation, that MLflow shows as traces; 0 shows none
        register: name in MLflow's registry under which the best model becomes a version; null registers none

    Raises:
        ValueError: the name cannot be a folder's, the store is no address or holds a password, or a number is out of
            its range.
    """

    def __init__(
        self,
        experiment: str = "ogls",
        run_name: str | None = None,
        folder: str = "runs",
        tracking_uri: str = "sqlite:///mlflow.db",
        tags: dict[str, str] | None = None,
        parent_run_id: str | None = None,
        system_metrics: bool = True,
        traces: int = 8,
        register: str | None = None,
    ) -> None:
        super().__init__()
        within("trainer.logger.init_args.traces", traces, "[0, 1000]")
        if register is not None and not _MODEL_NAME.fullmatch(register):
            raise ValueError(f"register names a model in MLflow: expected {_MODEL_NAME.pattern}, got {register!r}")
        self.traces, self.register = traces, register
        self._stamp = stamp()
        self.named = run_name is not None
        run_name = f"run-{self._stamp}" if run_name is None else run_name
        if not _SAFE_NAME.fullmatch(run_name):
            raise ValueError(f"a run's name becomes a folder: expected {_SAFE_NAME.pattern}, got {run_name!r}")
        check_tracking_uri(tracking_uri)
        if tracking_uri.startswith("sqlite:///"):  # absolute, so that the printed command works anywhere
            tracking_uri = f"sqlite:///{Path(tracking_uri.removeprefix('sqlite:///')).resolve()}"
        self.method: str | None = None
        self.seed, self.run_name, self.command = 0, run_name, "fit"
        self.folder, self.tracking_uri, self.experiment = Path(folder), tracking_uri, experiment
        tags = {**(tags or {}), FOLDER: run_name}
        if parent_run_id is not None:
            tags["mlflow.parentRunId"] = parent_run_id
        self._run = MLflowRun(tracking_uri, experiment, run_name, tags, system_metrics)
        self._outbox: Outbox | None = None
        self._ending: str | None = None
        self._lock: FileLock | None = None
        self._held = False
        self._latest: dict[str, float] = {}
        self._first: dict[str, float] = {}  # row of the first validation
        self._configuration: tuple[str, dict[str, Any]] = "", {}
        self._told = self._begun = False
        self.updates: Callable[[], int] | None = None  # number made so far; Lightning counts the one under way, too

    def describe(self, method: str, seed: int, given: Mapping[str, str] | None = None, command: str = "fit") -> None:
        """Says what is run. This comes before anything is logged, and names a run that has no name yet.

        Args:
            method: name of the method
            seed: seed of the run
            given: what differs from the configuration that the run began with, by dotted key
            command: what is run: ``fit``, ``validate``, ``test`` or ``predict``
        """
        self.method, self.seed, self.command = method, seed, command
        self._run.tags |= {"method": method, "seed": str(seed), COMMAND: command}
        if not self.named:
            self.run_name = f"{self.label}-{self._stamp}"
            self._run.tags[FOLDER] = self.run_name
            self._run.name = title(method, seed, given or {}, command)

    @property
    def label(self) -> str:
        """Returns the beginning of the run's name, made of method and seed."""
        return ("" if self.command == "fit" else f"{self.command}-") + label(self.method or "run", self.seed)

    # ---- what Lightning asks of a logger; checkpoints go to save_dir/name/version/checkpoints ----

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return self.run_name

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs one row of metrics: a line of metrics.jsonl and a batch for MLflow.

        The row's step is the number of updates that the weights have seen, where `updates` says it, else `step`.

        Raises:
            ValueError: a metric's name is one that MLflow refuses, such as `pass@8` for `pass_at_8`.
        """
        row = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        wrong = [name for name in row if not _METRIC_NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"metric names may have letters, digits, spaces and _ / . - but got {wrong[0]!r}")
        if not row:
            return
        self._record(row, self.updates() if self.updates else step or 0)

    def _record(self, row: Mapping[str, float], at: int) -> None:
        seconds = round(time.time(), 3)
        self._remember(row)
        self.append(METRICS, json.dumps({"step": at, "time": seconds, **row}) + "\n")
        self._box.put(lambda: self._run.metrics(row, at, seconds))
        if any(map(WHOLE.fullmatch, row)):
            self._first = self._first or dict(row)
            self._box.put(lambda: self._run.show(view(accuracies(row))))
            self._describe()

    def _remember(self, row: Mapping[str, float]) -> None:
        """Keeps the figures of the latest whole validation, unless one of a subset alone came after it."""
        if any(name.startswith("val_subset/") for name in row):
            self._latest = {}
        self._latest |= {name: value for name, value in row.items() if name.startswith("val/")}

    def keep(self, name: str, text: str) -> None:
        """Replaces a file in the run's folder."""
        try:
            (self.run_folder / name).parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.run_folder / name, text)
        except OSError as error:
            self._box.lose(f"{name}: {error}")

    def append(self, name: str, text: str, head: str = "") -> None:
        """Adds lines to a file in the run's folder, which begins with `head`."""
        try:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            with (self.run_folder / name).open("ab", buffering=0) as file:
                before, data = file.tell(), (text if file.tell() else head + text).encode()
                if file.write(data) != len(data):  # the next line would be glued to this one
                    file.truncate(before)
                    raise OSError(f"no room for {len(data)} bytes")
        except OSError as error:  # a full disk does not end a run here
            self._box.lose(f"{name}: {error}")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        values = vars(params) if isinstance(params, Namespace) else dict(params)
        self._box.put(lambda: self._run.params(values))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the run and waits for the calls under way. Within `kept_open`, a success ends nothing.

        The run's state is FINISHED after success, else what `end_as` set, else FAILED.
        """
        if self._held and status == "success":
            return
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if self._outbox is None:
            return
        if status == "success":
            self.log_metrics({f"final/{name[4:]}": value for name, value in self._latest.items()})
        state = "FINISHED" if status == "success" else self._ending or "FAILED"
        box, self._outbox = self._outbox, None
        ended = time.time()
        box.put(lambda: self._run.end(state, ended))
        box.close(_PATIENCE_LOCAL if self.tracking_uri.startswith("sqlite") else _PATIENCE_SERVER)
        print(f"\nRun {self.run_name} {state}; every metric is in {self.run_folder / METRICS}")
        if box.lost:
            print(f"MLflow at {self.tracking_uri} lacks {box.lost} of its entries. {box.error}")
            words = ["python", "-m", "ogls.tracking.replay", str(self.run_folder), self.tracking_uri]
            print(f"To add them: {shlex.join(words)}")
        print(f"MLflow: {self.ui_command}")
        if self.run_id is not None and self._run.experiment_id is not None:
            experiment = self._run.experiment_id
            print(f"This run: {address(self.tracking_uri, page_of_run(experiment, self.run_id))}")
            if self.traces:
                print(f"What it wrote: {address(self.tracking_uri, page_of_traces(experiment, self.run_id))}")
            print(f"All runs: {address(self.tracking_uri, page_of_runs(experiment))}", flush=True)

    # ---- the project's own ----

    @property
    def run_folder(self) -> Path:
        """Returns the folder of this run."""
        return self.folder / self.run_name

    @property
    def run_id(self) -> str | None:
        """Returns the run's id in MLflow; None until MLflow has been reached."""
        return self._run.run_id

    @property
    def ui_command(self) -> str:
        """Returns the command that shows this run in MLflow, or the address of the server."""
        if not self.tracking_uri.startswith("sqlite"):
            return self.tracking_uri
        beside = Path(sys.executable).parent / "mlflow"
        program = str(beside) if beside.exists() and not shutil.which("mlflow") else "mlflow"
        return shlex.join([program, "ui", "--backend-store-uri", self.tracking_uri, "--host", "127.0.0.1"])

    def resume(self, run_id: str | None, run_folder: Path | None = None) -> None:
        """Continues an earlier run. This comes before anything is logged.

        Args:
            run_id: id of the earlier run in MLflow; None takes the run of the same name
            run_folder: folder of the earlier run; None keeps the present folder
        """
        assert self._outbox is None, "this run has begun already"
        self._begun = True
        if run_folder is not None:
            self.folder, self.run_name, self.named = run_folder.parent, run_folder.name, True
            self._run.tags[FOLDER] = run_folder.name
            told = run_folder / DESCRIPTION
            self._run.name = json.loads(told.read_text())["name"] if told.is_file() else run_folder.name
        self._run.run_id, self._run.resumed = run_id, True

    @rank_zero_only
    def rewind(self, step: int, row: Mapping[str, float]) -> None:
        """Removes later steps from metrics.jsonl, trace.json and problems/, since these steps are made again.

        MLflow gets what it lacks of the rows that stay: a kill may have come before they were sent.

        Args:
            step: last step to keep
            row: metrics of that step, which are added if the file lacks them
        """
        file, trace = self.run_folder / METRICS, self.run_folder / TRACE
        rows = [kept for kept in read_rows(file, keep_damaged=True) if kept["step"] <= step] if file.exists() else []
        rows = [kept for kept in rows if not any(name.startswith("final/") for name in kept)]  # written at the end anew
        for kept in rows:
            self._remember(kept)
            if not self._first and any(map(WHOLE.fullmatch, kept)):
                self._first = dict(kept)
        write_rows(file, rows)
        self._box.put(lambda: self._run.add(rows))
        if trace.exists():
            phases = read_trace(trace, keep_damaged=True)
            replace_text(trace, TRACE_HEAD + trace_lines(i for i in phases if i.step <= step))
        for validation in (self.run_folder / PROBLEMS).glob("step-*.json"):
            if int(validation.stem.removeprefix("step-")) > step:
                validation.unlink()
        if row and not any(kept["step"] == step and "train/loss" in kept for kept in rows):
            self._record(row, step)

    @rank_zero_only
    def hold_folder(self) -> None:
        """Keeps all other runs out of this run's folder until it ends. Raises FolderInUse where another one has it."""
        if self._lock is None:
            self._lock = lock_folder(self.run_folder)

    @rank_zero_only
    def leave(self) -> None:
        """Takes the run's folder away where nothing but its lock is in it yet."""
        if self.run_folder.is_dir() and [file.name for file in self.run_folder.iterdir()] == ["lock"]:
            shutil.rmtree(self.run_folder)

    @rank_zero_only
    def begin(self, anew: bool = False) -> None:
        """Takes the run's folder for a run that begins.

        Args:
            anew: whether what a run left there that was killed before its first checkpoint is taken away

        Raises:
            ValueError: another run has been there.
        """
        self.hold_folder()
        if (self._begun or self._outbox is not None) and not anew:  # what is there is this run's own
            return
        self._begun = True
        if anew:
            for name in (METRICS, TRACE, ROLLOUTS, BEST):
                (self.run_folder / name).unlink(missing_ok=True)
        elif (self.run_folder / METRICS).exists():
            assert self._lock is not None
            self._lock.release()
            raise ValueError(
                f"{self.run_folder} has a run already: go on with it by --ckpt_path last, or give another run_name"
            )

    def end_as(self, state: Literal["FAILED", "KILLED"]) -> None:
        """Sets the state that an unsuccessful end will have."""
        self._ending = state

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Keeps the run open over several stages: a stage that succeeds inside does not end it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def configure(self, text: str, values: Mapping[str, Any]) -> None:
        """Says what the run's resolved configuration is, before anything is logged.

        Args:
            text: all of it, as YAML
            values: its leaves by dotted name
        """
        self._configuration = text, dict(values)

    def _describe(self) -> None:
        """Has the run's page in MLflow say what ran, by which command, and what it brought so far."""
        said = [f"**{self.method}**, seed {self.seed}", f"`{shlex.join(sys.argv)}`", f"Folder: `{self.run_folder}`"]
        for name in self._first:
            if WHOLE.fullmatch(name) or (OF_SET.fullmatch(name) and name in self._latest):
                before, now = (with_interval(row, name) for row in (self._first, self._latest))
                told = f"{before} before training, {now} at the last validation" if self.command == "fit" else now
                said.insert(1, f"{name.removeprefix('val/')}: {told}")
        self._box.put(lambda: self._run.describe("\n\n".join([*said, *self._links()])))

    def _links(self) -> list[str]:
        """Returns links to the run's own pages, in Markdown, for a run that is in MLflow."""
        if not self.traces or self.run_id is None or self._run.experiment_id is None:
            return []
        return [f"[What it wrote]({page_of_traces(self._run.experiment_id, self.run_id)})"]

    @property
    def configuration(self) -> dict[str, str]:
        """The leaves of the configuration as text; empty where nothing said what it is."""
        return {name: str(value) for name, value in self._configuration[1].items()}

    @property
    def config_sha256(self) -> str:
        """The sha256 of the configuration's text."""
        return sha256(self._configuration[0].encode()).hexdigest()

    @rank_zero_only
    def log_config(self, step: int = 0) -> None:
        """Logs the configuration: whole as `config.yaml`, its leaves as parameters, in the run's folder too.

        Args:
            step: updates before it; a run that goes on with another one keeps the first and adds `config-stepN.yaml`
        """
        text, leaves = self._configuration
        if not text or self._told:
            return
        self._told = True
        values = {**leaves, "method": self.method, "seed": self.seed}
        first = self.run_folder / CONFIG
        goes_on = bool(step) and first.is_file()
        kept = first.read_text() if goes_on else text
        if not goes_on:
            self.keep(CONFIG, text)
            self.keep(DESCRIPTION, json.dumps({**self._run.identity, "params": values}, indent=1, default=str))
        elif kept != text:
            changed = f"config-step{step}.yaml"
            self.keep(changed, text)
            self._box.put(lambda: self._run.text(text, changed))
        self.log_hyperparams(values)  # MLflow may lack them, and the first configuration, after a kill
        self._box.put(lambda: self._run.text(kept, CONFIG))

    @rank_zero_only
    def log_data(self, splits: Mapping[str, ProblemSource]) -> None:
        """Logs what is trained and judged on: per split the number of problems, the first few, and a digest."""
        described = problems_told(splits)
        self._box.put(lambda: self._run.data(described))

    @rank_zero_only
    def log_completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Logs one table of at most 100 rows in its own file, since adding to a table would write all of it again."""
        if rows:
            columns = list(rows[0])
            cells = [[row[column] for column in columns] for row in rows[:ROWS_LIMIT]]
            self._box.put(lambda: self._run.table(columns, cells, f"completions/step-{step:06d}.json"))

    @rank_zero_only
    def log_phases(self, phases: Sequence[Phase]) -> None:
        """Adds phases to the timeline in the run's folder; MLflow does not get them."""
        self.append(TRACE, trace_lines(phases), TRACE_HEAD)

    @rank_zero_only
    def log_problems(self, accuracy: Mapping[str, float], step: int) -> None:
        """Logs the accuracy of every held-out problem by its id, which paired tests of two runs need."""
        name, text = f"{PROBLEMS}/step-{step:06d}.json", json.dumps(dict(accuracy))
        self.keep(name, text)
        self._box.put(lambda: self._run.text(text, name))

    @rank_zero_only
    def log_folder(self, folder: Path, name: str) -> None:
        """Logs the files of a folder as artifacts."""
        self._box.put(lambda: self._run.folder(folder, name))

    @rank_zero_only
    def tell(self, call: Callable[[MLflowRun], object]) -> None:
        """Has the outbox make a call with the run in MLflow."""
        self._box.put(lambda: call(self._run))

    @property
    def _box(self) -> Outbox:
        if self._outbox is None:
            self._outbox = Outbox(_tell_loss)
        return self._outbox


def tracker_of(trainer: Any) -> Tracker | None:
    """Returns the tracker among the loggers of a Trainer; None where only others log, or none does."""
    return next((logger for logger in trainer.loggers if isinstance(logger, Tracker)), None)


def _tell_loss(reason: str) -> None:
    print(f"Not recorded: {reason}. The run goes on; its end tells what is missing.", file=sys.stderr, flush=True)
