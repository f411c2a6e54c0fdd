"""The training thread's side of tracking: Lightning's logger."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from ogls.records import Phase
from ogls.system.run_lock import RunLock
from ogls.tasks.base import ProblemSource
from ogls.tracking.files import (
    CONFIG,
    DESCRIPTION,
    METRICS,
    TRACE,
    TRACE_HEAD,
    read_rows,
    read_trace,
    replace_text,
    trace_lines,
    write_rows,
)
from ogls.tracking.mlflow_run import MLflowRun
from ogls.tracking.outbox import Outbox

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_METRIC_NAME = re.compile(r"[A-Za-z0-9_/.\- ]+")
_PATIENCE_LOCAL, _PATIENCE_SERVER = 300.0, 8.0  # seconds that the end of a run waits; a busy disk is slow
_ROWS_LIMIT = 100  # of a table of completions
_DESCRIBED = 5  # problems shown of each split
_OF_A_STEP = ("train/", "time/", "speed/")
_DIGESTED = 100  # problems hashed of each split: procedural ones have no end


class Tracker(Logger):
    """Lightning's logger for this project.

    Args:
        experiment: MLflow experiment.
        run_name: also the name of the run's folder; null makes one of method, seed and time.
        folder: holds one folder a run.
        tracking_uri: `sqlite:///file` or the address of an MLflow server.
        tags: further tags of the run.
        parent_run_id: shows this run below that one.
        system_metrics: processor, memory, disk, network and GPU, every 10 s.
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
    ) -> None:
        super().__init__()
        self._stamp = f"{datetime.now():%m%d-%H%M%S}-{token_hex(2)}"
        self._named = run_name is not None
        run_name = run_name or f"run-{self._stamp}"
        if not _SAFE_NAME.fullmatch(run_name):
            raise ValueError(f"a run's name becomes a folder: expected {_SAFE_NAME.pattern}, got {run_name!r}")
        if "://" not in tracking_uri or tracking_uri.startswith("file:"):
            raise ValueError(f"tracking_uri must be sqlite:///file or a server's address, got {tracking_uri!r}")
        if urlsplit(tracking_uri).password is not None:
            raise ValueError(
                "tracking_uri holds a password, which would be logged with the configuration: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        if tracking_uri.startswith("sqlite:///"):  # absolute, so that the printed command works anywhere
            tracking_uri = f"sqlite:///{Path(tracking_uri.removeprefix('sqlite:///')).resolve()}"
        self.method: str | None = None
        self.seed, self.run_name = 0, run_name
        self.folder, self.tracking_uri = Path(folder), tracking_uri
        tags = dict(tags or {})
        if parent_run_id is not None:
            tags["mlflow.parentRunId"] = parent_run_id
        self._run = MLflowRun(tracking_uri, experiment, run_name, tags, system_metrics)
        self._outbox: Outbox | None = None
        self._ending: str | None = None
        self._lock = RunLock()
        self._held = False
        self._latest: dict[str, float] = {}
        self.config_sha256: str | None = None
        self.updates: Callable[[], int] | None = None  # made so far; Lightning counts the update under way instead

    def describe(self, method: str, seed: int) -> None:
        """Says what is run, before anything is logged. It names the run, unless the run has a name.

        Args:
            method: the name that the method has by its choices
            seed: of the run, as tables count it
        """
        self.method, self.seed = method, seed
        self._run.tags |= {"method": method, "seed": str(seed)}
        if not self._named:
            self.run_name, self._run.name = f"{self.label}-{self._stamp}", f"{method}-s{seed}-{self._stamp}"

    @property
    def label(self) -> str:
        """Method and seed as the folders of their runs begin: ``OPSD-selection-ErrorSpan-s0``."""
        return f"{re.sub(r'[^A-Za-z0-9._]+', '-', self.method or 'run')[:40].strip('-')}-s{self.seed}"

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
        """One row: a line of the JSONL file and a batch for MLflow. Names are `pass_at_8`, never `pass@8`.

        The row's step is the number of updates that the weights have seen, where `updates` says it.
        """
        row = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        wrong = [name for name in row if not _METRIC_NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"metric names may have letters, digits, spaces and _ / . - but got {wrong[0]!r}")
        if not row:
            return
        self._record(row, self.updates() if self.updates else step or 0)

    def _record(self, row: Mapping[str, float], at: int) -> None:
        seconds = time.time()
        self._latest.update(row)
        self._append(METRICS, json.dumps({"step": at, "time": round(seconds, 3), **row}) + "\n")
        self._box.put(lambda: self._run.metrics(row, at, seconds))

    def _keep(self, name: str, text: str) -> None:
        try:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            (self.run_folder / name).write_text(text)
        except OSError as error:
            self._box.lose(f"{name}: {error}")

    def _append(self, name: str, text: str, head: str = "") -> None:
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
        """Ends the run: FINISHED after success, else what `end_as` said, else FAILED. Waits for what is under way."""
        if self._held and status == "success":
            return
        self._lock.release()
        if self._outbox is None:
            return
        if status == "success":
            self.log_metrics({f"final/{k[4:]}": v for k, v in self._latest.items() if k.startswith("val/")})
        state = "FINISHED" if status == "success" else self._ending or "FAILED"
        box, self._outbox = self._outbox, None
        ended = time.time()
        box.put(lambda: self._run.end(state, ended))
        box.close(_PATIENCE_LOCAL if self.tracking_uri.startswith("sqlite") else _PATIENCE_SERVER)
        print(f"\nRun {self.run_name} {state}; every metric is in {self.run_folder / METRICS}")
        if box.lost:
            print(f"MLflow at {self.tracking_uri} lacks {box.lost} of its entries. {box.error}")
            print(f"To add them: python -m ogls.tracking.replay {self.run_folder} {self.tracking_uri}")
        print(f"MLflow: {self.ui_command}", flush=True)

    # ---- the project's own ----

    @property
    def run_folder(self) -> Path:
        return self.folder / self.run_name

    @property
    def run_id(self) -> str | None:
        """MLflow's; None until the outbox has reached it."""
        return self._run.run_id

    @property
    def ui_command(self) -> str:
        """The command that shows this run; for a server, its address."""
        if not self.tracking_uri.startswith("sqlite"):
            return self.tracking_uri
        beside = Path(sys.executable).parent / "mlflow"
        program = str(beside) if beside.exists() and not shutil.which("mlflow") else "mlflow"
        return f"{program} ui --backend-store-uri {self.tracking_uri} --host 127.0.0.1"

    def resume(self, run_id: str | None, run_folder: Path | None = None) -> None:
        """Goes on in a run that was begun before, in its folder. To be called before anything is logged.

        In MLflow it is the run of this id or, where the id is not known, of the name that it had.
        """
        assert self._outbox is None, "this run has begun already"
        if run_folder is not None:
            self.folder, self.run_name, self._named = run_folder.parent, run_folder.name, True
            told = run_folder / DESCRIPTION
            self._run.name = json.loads(told.read_text())["name"] if told.is_file() else run_folder.name
        self._run.run_id, self._run.resumed = run_id, True

    @rank_zero_only
    def rewind(self, step: int, row: Mapping[str, float]) -> None:
        """Takes the rows of steps after `step` out of metrics.jsonl and trace.json: they are about to be made again.

        `row` is what `step` itself measured; it is added if the file lacks it.
        """
        file = self.run_folder / METRICS
        rows = [kept for kept in read_rows(file) if kept["step"] <= step] if file.exists() else []
        write_rows(file, rows)
        trace = self.run_folder / TRACE
        if trace.exists():
            replace_text(trace, TRACE_HEAD + trace_lines(i for i in read_trace(trace) if i.step <= step))
        if not any(kept["step"] == step and "train/loss" in kept for kept in rows):
            self._record({name: value for name, value in row.items() if name.startswith(_OF_A_STEP)}, step)

    @rank_zero_only
    def hold_folder(self) -> None:
        """No other run may write to this run's folder until it ends: FolderInUse if another one does so already."""
        if not self._lock.held:
            self._lock.acquire(self.run_folder)

    def end_as(self, state: Literal["FAILED", "KILLED"]) -> None:
        """What an unsuccessful end will be called."""
        self._ending = state

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Several stages in one run: success within does not end it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @rank_zero_only
    def log_config(self, text: str, values: Mapping[str, Any]) -> None:
        """The resolved configuration: whole as `config.yaml`, its leaves as parameters, in the run's folder too."""
        values = {**values, "method": self.method, "seed": self.seed}
        self.config_sha256 = sha256(text.encode()).hexdigest()
        self._keep(CONFIG, text)
        self._keep(DESCRIPTION, json.dumps({**self._run.identity, "params": values}, indent=1, default=str))
        self.log_hyperparams(values)
        self._box.put(lambda: self._run.text(text, CONFIG))

    @rank_zero_only
    def log_data(self, splits: Mapping[str, ProblemSource]) -> None:
        """What is trained and judged on: how many problems, how many left out, the first few, a digest of a hundred."""
        described = {}
        for name, problems in splits.items():
            head = [problems[i] for i in range(min(_DIGESTED, len(problems)))]
            lines = "\n".join(f"{p.id}\t{p.text}\t{p.answer}" for p in head)
            described[name] = {
                "problems": len(problems),
                "source": problems.origin,
                "dropped": dict(problems.dropped),
                "digest": sha256(lines.encode("utf-8", "replace")).hexdigest()[:12],
                "first": [{"id": p.id, "text": p.text, "answer": p.answer} for p in head[:_DESCRIBED]],
            }
        self._box.put(lambda: self._run.data(described))

    @rank_zero_only
    def log_completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """One table of at most 100 rows, in a file of its own: appending to a table would write it anew each time."""
        if rows:
            columns = list(rows[0])
            cells = [[row[column] for column in columns] for row in rows[:_ROWS_LIMIT]]
            self._box.put(lambda: self._run.table(columns, cells, f"completions/step-{step:06d}.json"))

    @rank_zero_only
    def log_phases(self, phases: Sequence[Phase]) -> None:
        """When phases ran, for the timeline; in the run's folder only."""
        self._append(TRACE, trace_lines(phases), TRACE_HEAD)

    @rank_zero_only
    def log_problems(self, accuracy: Mapping[str, float], step: int) -> None:
        """Accuracy of every held-out problem by its id, which paired tests of two runs need."""
        text = json.dumps(dict(accuracy))
        self._box.put(lambda: self._run.text(text, f"problems/step-{step:06d}.json"))

    @rank_zero_only
    def log_folder(self, folder: Path, name: str) -> None:
        """A folder as an artifact."""
        self._box.put(lambda: self._run.folder(folder, name))

    @property
    def _box(self) -> Outbox:
        if self._outbox is None:
            self._outbox = Outbox()
        return self._outbox
