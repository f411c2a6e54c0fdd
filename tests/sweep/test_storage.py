"""The database of a study, under several workers at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from ogls.sweep import attempts
from ogls.sweep.storage import open_storage


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:Heartbeat of storage")
def test_a_waiting_trial_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading that a trial waits and saying that it runs, nobody else may read it."""
    study = optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path}/sweeps.db", attempts.requeue_killed))
    for i in range(3):
        study.enqueue_trial({"x": i})
    check = RDBStorage.check_trial_is_updatable

    def slow_check(storage: RDBStorage, trial_id: int, state: TrialState) -> None:
        time.sleep(0.2)
        check(storage, trial_id, state)

    monkeypatch.setattr(RDBStorage, "check_trial_is_updatable", slow_check)
    with ThreadPoolExecutor(3) as workers:
        taken = list(workers.map(lambda _: study.ask().number, range(3)))
    assert sorted(taken) == [0, 1, 2]
