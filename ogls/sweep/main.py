"""Every sweep file has this command line, which carries out a study."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import optuna
from optuna import Study
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import TrialState

from ogls.sweep import attempts, dashboard
from ogls.sweep.budget import Cost, cost_of, pruner, spent_hours
from ogls.sweep.definition import Point, Settings, Sweep, parse
from ogls.sweep.record import StudyRecord
from ogls.sweep.report import resolve, write_report
from ogls.sweep.search_space import asked, check_space, keep_space
from ogls.sweep.storage import open_storage
from ogls.sweep.worker import Worker, shown
from ogls.tracking.address import masked

_DEFAULT_TRIALS = 24
_IDENTITY = "identity"


def main(sweep: Sweep, command_line: Sequence[str] | None = None, script: Path | None = None) -> None:
    """Carries out a study, or one worker's share of it, and ends the program.

    The exit code is 0 when there are enough trials, 2 for a configuration that cannot work, and 130 after a stop.

    Args:
        sweep: search space and objective
        command_line: words of the command line; None takes the program's own
        script: script that every run executes; None takes `experiments/run.py`
    """
    given = sys.argv[1:] if command_line is None else command_line
    settings = parse(sweep, f"Sweep {sweep.name}: see docs/sweeps.md.", given, script)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    print(f"Study {settings.study}: reading the configuration", flush=True)
    try:
        points = None if settings.grid is None else sweep.grid(settings.grid)
        study, created = open_study(sweep, settings, points)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # nothing has begun
        sys.exit(130)
    attempts.reclaim(study)
    record = StudyRecord(settings, study, created, _about(settings))
    worker = Worker(sweep, settings, study, record)
    for trial in attempts.latest(study):
        if trial.state.is_finished():  # MLflow may have been away when it was
            worker.settle(trial)
    worker.show_best()
    stopped = True
    try:
        worker.work(_wanted(settings, study))
        stopped = worker.stopping.is_set() and not worker.budget.spent
    finally:
        files = write_report(sweep, settings, study)
        for file in files:
            record.file(file)
        dashboard.show_files(settings, study, files)
        others = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        told = _outcome(settings, study)
        state = None if others else "KILLED" if stopped else "FINISHED"
        record.end(state, "\n\n".join(told))
        print("\n" + "\n".join(told))
        _conclude(settings)
        if worker.budget.spent:
            more = "a larger --device-hours goes on"
            print(f"The budget of {settings.device_hours:g} device hours is spent ({spent_hours(study):.3g}): {more}")
    sys.exit(130 if stopped else 0)


def open_study(sweep: Sweep, settings: Settings, points: Sequence[Point] | None) -> tuple[Study, bool]:
    """Returns the study, and whether it is new.

    Args:
        sweep: search space and objective
        settings: options of the command line
        points: points of the grid for the study's queue; None puts the sweep's first points into a new study's queue

    Raises:
        ValueError: a study of this name has other settings, or `run.py` does not accept its first point.
    """
    storage = open_storage(settings.storage, attempts.requeue_killed)
    common = {
        "storage": storage,
        "study_name": settings.study,
        # TPE is not seeded: workers that join with the same seed would try the same points.
        "sampler": optuna.samplers.TPESampler(),
    }
    directions: list[StudyDirection | Literal["minimize", "maximize"]] = [StudyDirection.MAXIMIZE]
    if settings.against is not None:
        directions.append(StudyDirection.MINIMIZE)
    first = list(sweep.first if points is None else points)
    new = None
    if settings.study not in optuna.get_all_study_names(storage):
        trial, options = asked(sweep, first[0] if first else {})
        new = trial, options, Cost.of(resolve(settings, options), settings.seeds)
        _check_devices(settings, new[2])
    try:
        study, created = optuna.create_study(directions=directions, **common), True
        if new is not None:
            trial, options, cost = new
            keep_space(study, trial, options)
            cost.keep(study)
        dashboard.note(study, _about(settings))
        study.set_user_attr(_IDENTITY, settings.identity)
    except DuplicatedStudyError:
        study, created = optuna.load_study(**common), False
        _check(study, settings, len(directions))
        _check_devices(settings, cost_of(study))
        check_space(sweep, study)
    study.set_metric_names(["accuracy", *([settings.against] if settings.against else [])])
    # A ladder is to be seen whole, also where it fails.
    study.pruner = pruner(settings.pruner or ("median" if points is None else "none"), cost_of(study))
    if created or points is not None:
        for point in first:
            study.enqueue_trial(dict(point), skip_if_exists=True)
    return study, created


def _check_devices(settings: Settings, cost: Cost) -> None:
    if settings.device_hours is not None and cost.devices is None:
        raise ValueError("--device-hours counts trainer.devices: give their number, such as -- --trainer.devices 1")


def _about(settings: Settings) -> str:
    """Returns the study's note in the dashboard."""
    given = " ".join([*(f"--config {config}" for config in settings.configs), *settings.further])
    seeds = f"{settings.seeds} seeds per trial" if settings.seeds > 1 else "one seed per trial"
    return f"`fit {given}`\n\n{seeds}. Runs and report: `{settings.place}`; MLflow: `{masked(settings.tracking_uri)}`."


def _check(study: Study, settings: Settings, objectives: int) -> None:
    deadline = time.monotonic() + 20  # the worker that made the study may be about to say
    while _IDENTITY not in study.user_attrs and time.monotonic() < deadline:
        time.sleep(0.1)
    # Studies that were begun before the first seed could be another say nothing of it.
    has = {"objectives": len(study.directions), "first_seed": 0, **study.user_attrs.get(_IDENTITY, {})}
    asked = {"objectives": objectives, **settings.identity}
    wrong = [f"{name}: {has.get(name)} there, {value} here" for name, value in asked.items() if has.get(name) != value]
    if wrong:
        raise ValueError(f"the study {settings.study!r} exists with other settings ({'; '.join(wrong)}): say --study")


def _wanted(settings: Settings, study: Study) -> int:
    """Returns the number of trials that the study is to have in all."""
    if settings.n_trials is not None:
        return settings.n_trials
    return len(attempts.latest(study)) if settings.grid is not None else _DEFAULT_TRIALS


def _outcome(settings: Settings, study: Study) -> list[str]:
    """Returns lines that tell how many trials ended how, and the best."""
    trials = attempts.latest(study)
    counts = {state.name.lower(): sum(trial.state == state for trial in trials) for state in TrialState}
    told = [f"Study {settings.study}: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count)]
    for trial in study.best_trials:
        values = ", ".join(f"{value:.4f}" for value in trial.values)
        told.append(f"best: trial {attempts.original(trial)}, {values}: {shown(trial.params)}")
    return told


def _conclude(settings: Settings) -> None:
    files = f"{settings.place} has trials.csv, plots.html, curve.png and best.yaml"
    print(f"{files}; {masked(settings.storage)} has the study")
    if shown := dashboard.command(settings):
        print(f"To look at it: {shown}    (pip install optuna-dashboard)", flush=True)
