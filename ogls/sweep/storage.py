"""Optuna keeps a study in any database it knows, or behind a gRPC proxy."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from filelock import FileLock
from optuna import Study
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, event
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from ogls.tracking.address import masked

HEARTBEAT, GRACE = 30, 300  # seconds; a starved machine is slow, not dead
_PAUSE = 1.0  # seconds before a database is opened again, whose tables another worker is making
_SEEN = "heartbeat"

Died = Callable[[Study, FrozenTrial], None]


class HeartbeatProxy(GrpcStorageProxy, BaseHeartbeat):
    """A heartbeat proxy is a gRPC proxy whose trials have heartbeats; Optuna's own proxy passes none on.

    The beat is an attribute of the trial. Clocks of hosts may differ, so a trial is stale when its beat has not changed
    for `GRACE` seconds of the observer's own clock.

    Args:
        host: host of the proxy's server
        port: port of the proxy's server
        died: function that is called with the study and a stale trial
    """

    def __init__(self, host: str, port: int, died: Died) -> None:
        super().__init__(host=host, port=port)
        self._died = died
        self._observed: dict[int, tuple[list[float], float]] = {}  # trial -> its beat, and when it was first seen

    def record_heartbeat(self, trial_id: int) -> None:
        from grpc import RpcError  # comes with vLLM; nobody else needs it

        with suppress(RpcError):  # the thread that beats would end, and the proxy may come back
            self.set_trial_system_attr(trial_id, _SEEN, [trial_id, time.time()])

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        now, stale = time.monotonic(), []
        for trial in self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            beat = trial.system_attrs.get(_SEEN)
            # Without a beat of its own, its worker has no proxy: the database keeps its beats elsewhere. A trial that
            # is queued again takes over the beats of the one before it.
            if beat is None or beat[0] != trial._trial_id:
                continue
            if trial._trial_id not in self._observed or self._observed[trial._trial_id][0] != beat:
                self._observed[trial._trial_id] = (beat, now)
            elif now - self._observed[trial._trial_id][1] > GRACE:
                stale.append(trial._trial_id)
        return stale

    def get_heartbeat_interval(self) -> int:
        return HEARTBEAT

    def get_heartbeat_stale_trial_callback(self) -> Died:
        return self._died


def open_storage(url: str, died: Died) -> BaseStorage:
    """Returns Optuna's storage at an address.

    Args:
        url: address of a database, or grpc://host:port
        died: function that is called with the study and a trial whose worker shows no more signs of life

    Raises:
        ValueError: the proxy or the database does not answer, or the address is malformed.
    """
    if url.startswith("grpc://"):
        host, colon, port = url.removeprefix("grpc://").rpartition(":")
        if not colon or not port.isdigit():
            raise ValueError(f"--storage: expected grpc://host:port, got {masked(url)!r}")
        proxy = HeartbeatProxy(host, int(port), died)
        try:
            proxy.wait_server_ready(timeout=30)
        except ConnectionError as error:
            raise ValueError(f"--storage {masked(url)}: no answer within 30 s") from error
        return proxy
    if not url.startswith("sqlite:///"):
        return _database(url, died, {"pool_pre_ping": True})
    # Two workers that begin a new file at once would both make its tables.
    try:
        with FileLock(f"{url.removeprefix('sqlite:///')}.lock", timeout=300):
            storage = _database(url, died, {"connect_args": {"timeout": 120, "isolation_level": None}})
    except OSError as error:
        raise ValueError(f"--storage {url}: no file can be made there ({error.strerror})") from error
    # Optuna reads a trial's state before it takes the trial. SQLite locks no rows: without this, two workers
    # may both take it.
    event.listen(storage.engine, "begin", _lock)
    return storage


def _database(url: str, died: Died, engine: dict[str, object], tries: int = 5) -> RDBStorage:
    try:
        return RDBStorage(
            url,
            engine_kwargs=engine,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=died,
        )
    except (SQLAlchemyError, ImportError, ValueError) as error:
        if tries > 1 and isinstance(error, (IntegrityError, ProgrammingError)):
            time.sleep(_PAUSE)
            return _database(url, died, engine, tries - 1)
        said = str(getattr(error, "orig", None) or type(error).__name__).partition("\n")[0]
        raise ValueError(
            f"--storage {masked(url)}: no database could be opened there ({said}); expected sqlite:///file, "
            "grpc://host:port, or an address such as postgresql://user@host/name"
        ) from error


def _lock(connection: Connection) -> None:
    """Locks the database from the first read of a transaction to its end."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
