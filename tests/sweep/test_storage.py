"""The database of a study, under several workers at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError

from ogls.sweep import attempts, storage
from ogls.sweep.storage import open_storage
from ogls.tracking.address import masked
from tests.sweep.test_study import sweep


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


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_two_workers_that_begin_at_once_make_the_tables_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL tells the second of them that a table is there already, and then it is."""
    opened, url = RDBStorage.__init__, f"sqlite:///{tmp_path}/sweeps.db"
    answers = [IntegrityError("CREATE TABLE", None, Exception("duplicate key")), None]

    def open_in_turn(self: RDBStorage, *args: object, **options: object) -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        opened(self, *args, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(storage, "_PAUSE", 0.0)
    monkeypatch.setattr(RDBStorage, "__init__", open_in_turn)
    assert open_storage(url, attempts.requeue_killed).get_all_studies() == []
    answers = [IntegrityError("CREATE TABLE", None, Exception("duplicate key")) for _ in range(9)]
    with pytest.raises(ValueError, match=r"no database could be opened there \(duplicate key"):
        open_storage(url, attempts.requeue_killed)


@pytest.mark.fault("bad configuration")
@pytest.mark.parametrize(
    "address",
    [
        *("sweeps.db", "sqlite://sweeps.db", "nosuch://h/x", "grpc://nowhere", "", "postgresql://me:s3cret@"),
        *("sqlite:////proc/none/sweeps.db", "mysql://me:s3cret@h:p/x", "grpc://me:s3cret@h:p"),
    ],
)
def test_a_malformed_storage_ends_with_one_line(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep("--storage", address) == 2
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1, said
    assert said.startswith("error: --storage")
    assert "s3cret" not in said


@pytest.mark.fault("secrets leak")
@pytest.mark.parametrize("address", ["https://s3cret@h/", "https://h/?token=s3cret", "postgresql://me:s3cret@h/x"])
def test_a_secret_in_the_address_of_the_store_is_refused(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep("--tracking-uri", address) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: --tracking-uri: tracking_uri holds a user")
    assert "s3cret" not in said


def test_a_password_is_not_printed() -> None:
    assert masked("postgresql://me:s3/c@ret@h:5432/x?sslpassword=s3cret") == "postgresql://***@h:5432/x?***"
    assert masked("sqlite:////tmp/sweeps.db") == "sqlite:////tmp/sweeps.db"
