"""Attempts decide which trials are made: an interrupted one is queued again.

A finished trial never is.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import optuna
import psutil
from optuna import Study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

RETRIES = 2  # further attempts at a trial whose process was killed
_ORIGINAL, _KILLED, _WORKER = "original", "killed", "worker"


def original(trial: FrozenTrial | optuna.Trial) -> int:
    """Returns the number of the trial that this one continues, or its own for a new one. Folders are named by it."""
    return trial.user_attrs.get(_ORIGINAL, trial.number)


def latest(study: Study) -> list[FrozenTrial]:
    """Returns the last attempt at each trial."""
    trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
    return list({original(trial): trial for trial in trials}.values())


def spent(study: Study) -> int:
    """Returns the number of trials that count towards `--n-trials`: all but those in the queue."""
    return sum(trial.state != TrialState.WAITING for trial in latest(study))


def goes_on(study: Study, trial: FrozenTrial) -> bool:
    """Returns whether there is a later attempt at this trial."""
    return any(original(t) == original(trial) and t.number > trial.number for t in study.get_trials(deepcopy=False))


def requeue(study: Study, trial: FrozenTrial | optuna.Trial, killed: bool) -> bool:
    """Puts a trial that did not come to its end back into the queue, with the same parameters.

    Returns False where its process has been killed more than `RETRIES` times; interruptions do not count.
    """
    kills = trial.user_attrs.get(_KILLED, 0) + killed
    if kills > RETRIES:
        return False
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={_ORIGINAL: original(trial), _KILLED: kills},
        )
    )
    return True


def died(study: Study, trial: FrozenTrial) -> None:
    """Puts a trial whose worker is gone back into the queue."""
    requeue(study, trial, killed=True)


def sign(trial: optuna.Trial) -> None:
    """Records who runs this trial: host, process, and when that began, since process numbers are used again."""
    trial.set_user_attr(_WORKER, [socket.gethostname(), os.getpid(), psutil.Process().create_time()])


def reclaim(study: Study) -> None:
    """Puts trials whose worker is gone back into the queue.

    That is known at once of a worker on this host, and by a stale heartbeat of any other.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, pid, started = trial.user_attrs.get(_WORKER, ("", 0, 0.0))
        if host == socket.gethostname() and not _runs(pid, started):
            with suppress(ValueError, UpdateFinishedTrialError):  # another worker was quicker
                study.tell(trial.number, state=TrialState.FAIL)
                requeue(study, trial, killed=True)
    optuna.storages.fail_stale_trials(study)


def _runs(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.NoSuchProcess:
        return False
