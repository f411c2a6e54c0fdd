"""A sweep is defined by its file and by the options of the command line."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import optuna

from ogls.sweep.budget import PRUNERS, Pruning
from ogls.sweep.run_numbers import RunNumbers
from ogls.tracking.address import check_tracking_uri

Options = Mapping[str, object]  # options of run.py: key -> value
Point = Mapping[str, float | int | str | bool | None]  # point of a search space: parameter -> value

PROJECT = Path(__file__).resolve().parents[2]
AGAINST: dict[str, Callable[[RunNumbers], float]] = {
    "length": lambda run: run.last("val/length_mean"),
    "kl": lambda run: run.recent("train/kl_target_student"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")


def override(class_path: str, **init_args: object) -> dict[str, object]:
    """Returns a part of the configuration, given by its class, as `run.py` takes it."""
    return {"class_path": class_path, "init_args": init_args}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep is a search space and an objective.

    Args:
        name: name of the study, unless `--study` gives another
        space: function that has a trial suggest values and returns the options of `run.py` that they stand for
        objective: function of one finished run's numbers that is maximised; a trial's value is its mean over the seeds
        first: points that are tried before any other; a parameter that a point leaves open is sampled
        ladder: values of some parameters, all combinations of which `--grid` tries
        fixed: values of the other parameters while the ladder is tried
    """

    name: str
    space: Callable[[optuna.Trial], Options]
    objective: Callable[[RunNumbers], float]
    first: Sequence[Point] = ()
    ladder: Mapping[str, Sequence[float | int | str | bool]] = field(default_factory=dict)
    fixed: Point = field(default_factory=dict)

    def grid(self, rungs: Sequence[str]) -> list[Point]:
        """Returns the points of the ladder.

        Args:
            rungs: parameters and their values, such as ``alpha=0,1,2``, in place of the ladder; may be empty

        Raises:
            ValueError: a rung is not NAME=VALUE,VALUE or there is no ladder.
        """
        ladder = dict(self.ladder)
        if rungs:
            ladder = {}
            for rung in rungs:
                name, equals, values = rung.partition("=")
                if not equals or not values:
                    raise ValueError(f"--grid takes NAME=VALUE,VALUE..., got {rung!r}")
                ladder[name] = [_value(text) for text in values.split(",")]
        if not ladder:
            raise ValueError(f"the sweep {self.name!r} has no ladder: say --grid NAME=VALUE,VALUE...")
        fixed = {name: value for name, value in self.fixed.items() if name not in ladder}
        return [fixed | dict(zip(ladder, values, strict=True)) for values in itertools.product(*ladder.values())]


def _value(text: str) -> float | int | str | bool:
    """Returns a number, true or false where the text reads as one, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings are what the command line tells one worker of a study; each field is an option."""

    study: str
    configs: tuple[str, ...]
    further: tuple[str, ...]
    n_trials: int | None
    jobs: int
    timeout: float | None
    device_hours: float | None
    pruner: Pruning | None
    seeds: int
    first_seed: int
    against: str | None
    grid: tuple[str, ...] | None
    storage: str
    tracking_uri: str
    experiment: str
    folder: Path
    script: Path

    @property
    def place(self) -> Path:
        """Returns the study's folder on this machine."""
        return self.folder / self.study

    @property
    def identity(self) -> dict[str, object]:
        """Returns the settings that all trials of a study share. A worker with others may not join it."""
        configs, further = list(self.configs), list(self.further)
        seeds = {"seeds": self.seeds, "first_seed": self.first_seed}
        return {"configs": configs, "further": further, **seeds, "against": self.against}


class _Parser(argparse.ArgumentParser):
    """This parser says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse(sweep: Sweep, about: str, arguments: Sequence[str], script: Path | None = None) -> Settings:
    """Returns the settings of a sweep's command line. Impossible values end the program with exit code 2.

    Args:
        sweep: sweep whose name is the study's default
        about: description for `--help`
        arguments: words of the command line; those after ``--`` go to every run
        script: script that every run executes; None takes `experiments/run.py`
    """
    arguments = list(arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _Parser(description=about, allow_abbrev=False, epilog="What follows -- goes to every run.")
    add = parser.add_argument
    add("--config", action="append", metavar="FILE", help="configuration of run.py; repeatable (default: lab.yaml)")
    add("--study", default=sweep.name, help="name of the study; one that exists goes on (default: %(default)s)")
    add("--n-trials", type=int, help="number of trials in the whole study, those already made included (default: 24)")
    add("--jobs", type=int, default=1, help="number of trials at a time on this machine (default: %(default)s)")
    add("--timeout", type=float, metavar="SECONDS", help="time after which the sweep stops as it does at Ctrl-C")
    add("--device-hours", type=float, metavar="HOURS", help="budget of the whole study: time of all runs x devices")
    add("--pruner", choices=PRUNERS, help="how trials are ended early (default: median, and none on a ladder)")
    add("--seeds", type=int, default=1, help="number of runs per trial, whose mean is its value (default: %(default)s)")
    add("--first-seed", type=int, default=0, help="seed of a trial's first run (default: %(default)s)")
    add("--against", choices=AGAINST, help="second objective, which is minimised; nothing is pruned then")
    add("--grid", nargs="*", metavar="NAME=VALUE,...", help="ladder to try, and nothing else (default: the sweep's)")
    add("--storage", default="sqlite:///sweeps.db", help="Optuna's database or grpc://host:port (default: %(default)s)")
    add("--tracking-uri", default="sqlite:///mlflow.db", help="MLflow's store (default: %(default)s)")
    add("--experiment", default="sweeps", help="name of the MLflow experiment (default: %(default)s)")
    add("--folder", type=Path, default=Path("runs"), help="folder with one folder per study (default: %(default)s)")
    given = parser.parse_args(arguments[:split])
    for name in ("n_trials", "jobs", "seeds"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    if given.first_seed < 0:
        parser.error(f"--first-seed must be at least 0, got {given.first_seed}")
    for name in ("timeout", "device_hours"):
        if getattr(given, name) is not None and not getattr(given, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(given, name):g}")
    if given.pruner is not None and given.against is not None:
        parser.error(f"--pruner {given.pruner}: with --against nothing is pruned; leave one of them out")
    if not _NAME.fullmatch(given.study):
        parser.error(f"--study becomes a folder: expected {_NAME.pattern}, got {given.study!r}")
    try:
        check_tracking_uri(given.tracking_uri)
    except ValueError as error:
        parser.error(f"--tracking-uri: {error}")
    storage, tracking_uri = _absolute(given.storage), _absolute(given.tracking_uri)
    if storage == tracking_uri:
        parser.error(f"Optuna and MLflow cannot share a file: --storage and --tracking-uri are both {given.storage}")
    return Settings(
        study=given.study,
        configs=tuple(given.config or ["lab.yaml"]),
        further=tuple(arguments[split + 1 :]),
        n_trials=given.n_trials,
        jobs=given.jobs,
        timeout=given.timeout,
        device_hours=given.device_hours,
        pruner=given.pruner,
        seeds=given.seeds,
        first_seed=given.first_seed,
        against=given.against,
        grid=None if given.grid is None else tuple(given.grid),
        storage=storage,
        tracking_uri=tracking_uri,
        experiment=given.experiment,
        folder=given.folder,
        script=script or PROJECT / "experiments" / "run.py",
    )


def _absolute(uri: str) -> str:
    """Returns a file's address with its absolute path: MLflow keeps connections by address, whatever the folder is."""
    file = uri.removeprefix("sqlite:///")
    return uri if file == uri else f"sqlite:///{Path(file).resolve()}"
