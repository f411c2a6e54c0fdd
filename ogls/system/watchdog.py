"""A time limit ends a phase that hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ogls.system.exits import EngineFailed

_SIGNAL = signal.SIGUSR2  # wakes the main thread even in a system call


class TimeExpired(RuntimeError):
    """A phase took longer than it may."""


@contextmanager
def time_limit(
    phase: str, seconds: float, grace: float = 30.0, signs: Callable[[], int] | None = None
) -> Iterator[None]:
    """TimeExpired is raised inside this context after `seconds`, and the stacks of all threads are printed.

    With `signs` the seconds are those since its number last changed, so that long work which goes on is left alone.

    If the phase still does not end, because it is in native code, for example, the process ends `grace` seconds later
    with the exit code of a failed engine. Outside of the main thread nothing can be raised, so there only the process
    can end.

    Args:
        phase: name of the phase, for messages
        seconds: time that the phase may take
        grace: seconds between the error and the end of the process
        signs: number of signs of life that the phase has given so far
    """
    late = f"did not end within {seconds:g} s" if signs is None else f"gave no sign of life for {seconds:g} s"
    done, lock = threading.Event(), threading.Lock()
    main = threading.current_thread() is threading.main_thread()

    def expire(number: int, frame: FrameType | None) -> None:
        if not done.is_set():
            raise TimeExpired(f"{phase} {late}")

    def watch() -> None:
        seen, since = signs and signs(), time.monotonic()
        while (left := since + seconds - time.monotonic()) > 0:
            if done.wait(left if signs is None else min(left, seconds / 10)):
                return
            if signs is not None and (now := signs()) != seen:
                seen, since = now, time.monotonic()
        print(f"\n{phase} {late}; all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=2)
        with lock:
            if main and not done.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
        if not done.wait(grace):
            print(f"{phase} cannot be interrupted: the process ends", file=sys.stderr, flush=True)
            os._exit(EngineFailed.exit_code)

    previous = signal.signal(_SIGNAL, expire) if main else None
    thread = threading.Thread(target=watch, name=f"ogls-watchdog {phase}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        with lock:  # waits until a signal under way has arrived; `expire` then ignores it
            pass
        thread.join()
        if main:
            signal.signal(_SIGNAL, previous)
