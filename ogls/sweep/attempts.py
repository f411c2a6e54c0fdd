"""Attempts decide which trials are made: an interrupted one is queued again.

A finished trial never is.
"""

from __future__ import annotations

import socket
from contextlib import suppress

import optuna
import psutil
from optuna import Study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

RETRIES = 2
"""A trial whose process was killed is queued again unless it was queued this often before."""
_ORIGINAL, _WORKER = "failed_trial", "worker"


def requeue_killed(study: Study, trial: FrozenTrial) -> None:
    """Puts a trial whose worker or process is gone back into the queue, with the same parameters."""
    RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, trial)


def requeue_stopped(study: Study, trial: FrozenTrial) -> None:
    """Puts a trial that was asked to stop back into the queue, however often that happened."""
    RetryHeartbeatStaleTrialCallback()(study, trial)


def original(trial: FrozenTrial) -> int:
    """Returns the number of the trial that this one continues, or its own for a new one. Folders are named by it."""
    return trial.system_attrs.get(_ORIGINAL, trial.number)


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


def sign(trial: optuna.Trial) -> None:
    """Records who runs this trial: host, process, and when that began, since process numbers are used again."""
    process = psutil.Process()
    # The number of the trial, since a trial that is queued again takes over what the one before it recorded.
    trial.set_user_attr(_WORKER, [trial.number, socket.gethostname(), process.pid, process.create_time()])


def reclaim(study: Study) -> None:
    """Puts trials whose worker is gone back into the queue.

    That is known at once of a worker on this host, and by a stale heartbeat of any other.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        number, host, pid, started = trial.user_attrs.get(_WORKER, (-1, "", 0, 0.0))
        if number == trial.number and host == socket.gethostname() and not _runs(pid, started):
            with suppress(ValueError, UpdateFinishedTrialError):  # another worker was quicker
                study.tell(trial.number, state=TrialState.FAIL)
                requeue_killed(study, trial)
    optuna.storages.fail_stale_trials(study)


def _runs(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.NoSuchProcess:
        return False
