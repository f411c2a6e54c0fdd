"""A budget in device hours ends a study; pruners spend it on promising trials.

device hours = sum over all attempts at trials of their duration * devices of one run
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal, get_args

import optuna
import yaml
from optuna import Study
from optuna.pruners import BasePruner
from optuna.trial import TrialState

Pruning = Literal["median", "halving", "hyperband", "none"]
PRUNERS: tuple[Pruning, ...] = get_args(Pruning)
_REDUCTION = 3  # of three trials at a rung, one goes on
_COST = "cost"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A cost is what one trial takes at most.

    Args:
        devices: number of devices of a run; None where the configuration leaves it open
        every: optimiser steps from one validation to the next
        steps: optimiser steps of all runs of a trial
    """

    devices: int | None = 1
    every: int = 1
    steps: int | Literal["auto"] = "auto"

    @classmethod
    def of(cls, configuration: str, seeds: int) -> Cost:
        """Returns what a resolved configuration of `run.py fit` costs with this number of seeds."""
        config: dict[str, Any] = yaml.safe_load(configuration)
        trainer, data = config.get("trainer") or {}, config.get("data") or {}
        devices = trainer.get("devices", 1)
        devices = len(devices) if isinstance(devices, list) else devices
        known = isinstance(devices, int) and devices > 0  # not "auto", nor -1
        epoch, epochs = data.get("steps_per_epoch", 1), trainer.get("max_epochs")
        return cls(
            devices=devices * (trainer.get("num_nodes") or 1) if known else None,
            every=epoch * (trainer.get("check_val_every_n_epoch") or 1),
            steps="auto" if epochs is None else epoch * epochs * seeds,
        )

    def keep(self, study: Study) -> None:
        """Writes the cost into the study, where `cost_of` finds it."""
        study.set_user_attr(_COST, asdict(self))


def cost_of(study: Study) -> Cost:
    """Returns the cost of a trial of the study; one device, where the study does not know."""
    return Cost(**study.user_attrs.get(_COST, {}))


def pruner(pruning: Pruning, cost: Cost) -> BasePruner:
    """Returns Optuna's pruner of this name.

    ``median`` ends a trial below the median of the others at the same step. ``halving`` lets a third of the trials go
    on from the first validation to three times its steps, a third of these to nine times, and so on (successive
    halving). ``hyperband`` has several such ladders, some of which begin later.
    """
    if pruning == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5)
    if pruning == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=cost.every, reduction_factor=_REDUCTION)
    if pruning == "hyperband":
        return optuna.pruners.HyperbandPruner(cost.every, cost.steps, _REDUCTION)
    return optuna.pruners.NopPruner()


def spent_hours(study: Study) -> float:
    """Returns the device hours of all attempts at trials so far, those under way included."""
    devices, now, seconds = cost_of(study).devices or 1, datetime.now(), 0.0
    for trial in study.get_trials(deepcopy=False):
        if trial.datetime_start is not None and trial.state != TrialState.WAITING:
            seconds += max(0.0, ((trial.datetime_complete or now) - trial.datetime_start).total_seconds())
    return devices * seconds / 3600


class Budget:
    """A budget sets `stopping` once the study has spent its device hours.

    Args:
        study: Optuna's study
        hours: device hours of the whole study, of all its workers; None sets no end
        jobs: number of trials at a time here, which says how soon to look again
        stopping: event that ends the trials under way
    """

    def __init__(self, study: Study, hours: float | None, jobs: int, stopping: threading.Event) -> None:
        self._study, self._hours, self._jobs, self._stopping = study, hours, jobs, stopping
        self.spent = False

    def look(self) -> float:
        """Sets `stopping` if the budget is spent, and returns the seconds until it may be."""
        if self._hours is None:
            return 0.0
        left = self._hours - spent_hours(self._study)
        if left <= 0 and not self._stopping.is_set():
            self.spent = True
            self._stopping.set()
        return 3600 * left / ((cost_of(self._study).devices or 1) * self._jobs)

    def watch(self) -> None:
        """Looks again and again, in a thread of its own, until `stopping` is set."""
        if self._hours is not None:
            threading.Thread(target=self._look_on, name="ogls-budget", daemon=True).start()

    def _look_on(self) -> None:
        while not self._stopping.wait(min(60.0, max(0.2, self.look() / 4))):
            pass
