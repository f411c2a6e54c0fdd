"""A reaper kills its own process at the n-th event of a kind: a call of MLflow's, or an operation on some file."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from sqlalchemy import event
from sqlalchemy.engine import Engine

EVENTS = "events-{}"  # file with the number of events of a kind in a process that came to its end
_FILES = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def arm(kind: str, at: int) -> None:
    """Kill this process at its event number `at`, counted from 1; with 0 they are counted only.

    Args:
        kind: "mlflow" for before and after every call of its client, and before every statement and commit to its
            database; else part of the paths to which operations count, each before it is done
        at: number of the event
    """
    numbers, last, here = itertools.count(1), [0], os.getpid()

    def happens(*_: Any, **__: Any) -> None:
        last[0] = next(numbers)
        if last[0] == at and os.getpid() == here:
            os.kill(here, signal.SIGKILL)

    if kind == "mlflow":
        _at_calls(happens)
    else:
        _at_operations(kind, happens)
    file = Path(EVENTS.format(kind.strip("/"))).resolve()
    atexit.register(lambda: file.write_text(str(last[0])))


def _at_calls(happens: Callable[..., None]) -> None:
    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def inner(*args: Any, **kwargs: Any) -> Any:
            happens()
            result = call(*args, **kwargs)
            happens()
            return result

        return inner

    for name, call in vars(MlflowClient).items():
        if callable(call) and not name.startswith("_"):
            setattr(MlflowClient, name, around(call))
    for moment in ("before_cursor_execute", "commit"):
        event.listen(Engine, moment, happens, named=True)


def _at_operations(part: str, happens: Callable[..., None]) -> None:
    def heard(name: str, args: tuple[Any, ...]) -> None:
        if name in _FILES and any(isinstance(a, str | Path) and part in str(a) for a in args[:2]):
            happens()

    sys.addaudithook(heard)
