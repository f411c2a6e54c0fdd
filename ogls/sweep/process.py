"""A run of a trial is a process that is watched through its file of metrics."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from ogls.callbacks.best import LAST, PREVIOUS
from ogls.sweep.definition import Options, Settings
from ogls.sweep.run_numbers import RunNumbers
from ogls.system import attached
from ogls.system.exits import DiskFailed, EngineFailed, FolderInUse
from ogls.system.run_lock import lock_folder
from ogls.tracking.files import CHECKPOINTS, METRICS, replace_text

_POLL = 0.5  # seconds
_PATIENCE = 600.0  # for the step under way and the validation that may be due


class Stopped(Exception):
    """Stopped is raised where the sweep was asked to stop."""

    def __init__(self, why: str = "the sweep was stopped") -> None:
        super().__init__(why)


class Killed(Exception):
    """Killed is raised where something other than the sweep killed the process."""


class Failed(Exception):
    """Failed is raised where the run ended with an error, or measured something that is no number."""


def arguments(settings: Settings, options: Options) -> list[str]:
    """Returns the arguments of `run.py` for a point of the search space."""
    configs = [word for config in settings.configs for word in ("--config", config)]
    given = [word for name, value in options.items() for word in (f"--{name}", written(value))]
    return [*configs, *settings.further, *given]


def written(value: object) -> str:
    """Returns a value as `run.py` reads it."""
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """A trial run is the run of one trial with one seed.

    Args:
        settings: options of the sweep's command line
        number: number of the trial, by which a run that was interrupted is found
        seed: seed of the run
        options: options of `run.py` for the trial's point
        parent_run_id: id of the study's run in MLflow; None where it is not known
        stopping: event that is set when the sweep has to end
    """

    settings: Settings
    number: int
    seed: int
    options: Options
    parent_run_id: str | None
    stopping: threading.Event

    @property
    def name(self) -> str:
        """Returns the run's name, such as ``STUDY-007-s0``."""
        return f"{self.settings.study}-{self.number:03d}-s{self.seed}"

    @property
    def folder(self) -> Path:
        """Returns the run's folder."""
        return self.settings.place / self.name

    @property
    def command(self) -> list[str]:
        """Returns the command that starts the run, or goes on with it where it has a checkpoint."""
        tracker = {
            "experiment": self.settings.experiment,
            "tracking_uri": self.settings.tracking_uri,
            "folder": str(self.settings.place),
            "run_name": self.name,
            "parent_run_id": self.parent_run_id,
            "tags": {"study": self.settings.study, "trial": str(self.number)},
        }
        logger = [w for key, value in tracker.items() for w in (f"--trainer.logger.init_args.{key}", written(value))]
        start = [sys.executable, str(Path(attached.__file__)), str(self.settings.script), "fit"]
        seeds = ["--seed_everything", str(self.seed), "--data.seed", str(self.seed)]
        resume = ["--ckpt_path", "last"] if self._can_go_on else []
        return [*start, *arguments(self.settings, self.options), *seeds, *logger, *resume]

    @property
    def _checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def measured(self) -> RunNumbers:
        """Returns the numbers that the run has written so far."""
        return RunNumbers(self.folder / METRICS).update()

    @property
    def _can_go_on(self) -> bool:
        return any((self._checkpoints / file).exists() for file in (LAST, PREVIOUS))

    def _claim(self) -> None:
        """Says in the folder what is run there. Raises Stopped where a run with other options has the folder."""
        file, asked = self.folder / "trial.json", json.dumps(arguments(self.settings, self.options))
        has = file.read_text() if file.exists() else None
        if has is None and not (self.folder / METRICS).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(file, asked)
        elif has != asked:
            self.stopping.set()  # the other trials would meet the same
            raise Stopped(f"{self.folder} has a run with other options, {has}, not {asked}: say --study or --folder")

    def watch(self) -> Generator[RunNumbers, None, None]:
        """Starts the run, or goes on with it, and yields its numbers again and again while it runs.

        A run that came to its end before is not made again. Leaving the iteration ends the run after the step under
        way.

        Raises:
            Stopped: the sweep was asked to stop.
            Killed: something else killed the process.
            Failed: the run ended with an error, or measured something that is no number.
        """
        self._let_predecessor_end()
        self._claim()
        numbers = self.measured()
        if numbers.finished:
            yield numbers
            return
        if not self._can_go_on:  # begun, perhaps, but nothing to go on from
            shutil.rmtree(self.folder, ignore_errors=True)
            numbers = self.measured()
            self._claim()
        with (self.folder / "output.log").open("ab") as log:
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
            try:
                while process.poll() is None:
                    if self.stopping.wait(_POLL):
                        raise Stopped
                    yield self._sound(numbers)
            finally:
                self._end(process)
        yield self._sound(numbers)
        code = process.returncode
        if code < 0 or code > 128 or code == EngineFailed.exit_code:
            raise Killed(f"{self.name} was killed (exit code {code}): see {self.folder}/output.log")
        if code == DiskFailed.exit_code:
            self.stopping.set()  # the other runs would fare no better
            raise Stopped(self._complaint())
        if code > 0:
            raise Failed(f"{self.name} ended with {code}: {self._complaint()}")
        if not numbers.finished:
            raise Failed(f"{self.name} ended well but measured nothing: see {self.folder}/output.log")

    def _let_predecessor_end(self) -> None:
        """Waits for an earlier run in the folder: if its sweep was killed, it ends after the step under way."""
        while True:
            try:
                return lock_folder(self.folder).release()
            except FolderInUse:
                if self.stopping.wait(_POLL):
                    raise Stopped from None

    def _sound(self, numbers: RunNumbers) -> RunNumbers:
        wrong = numbers.update().not_finite()
        if wrong is not None:
            raise Failed(f"{self.name}: {wrong}")
        return numbers

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Ends the process as Ctrl-C would: the step under way is finished and a checkpoint written."""
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdin is not None
        process.stdin.close()

    def _complaint(self) -> str:
        lines = (self.folder / "output.log").read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it said nothing'} (all of it in {self.folder}/output.log)"

    def tidy(self) -> None:
        """Deletes the checkpoints of a finished trial, which nobody goes on from; the best adapter stays."""
        shutil.rmtree(self._checkpoints, ignore_errors=True)
