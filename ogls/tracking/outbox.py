"""An outbox makes calls to the outside world, so that training never waits."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable


class Outbox:
    """An outbox is a bounded queue of calls and the background thread that makes them in order.

    A call that raises, or that finds the queue full, is lost. `lost` counts such calls, and `error` keeps the first
    reason.

    Args:
        tell: function that is called with the first reason, at once
        capacity: largest number of waiting calls
    """

    def __init__(self, tell: Callable[[str], None] = lambda reason: None, capacity: int = 10_000) -> None:
        self._tell = tell
        self.lost = 0
        self.error: str | None = None
        self._abandoned = False
        self._lock = threading.Lock()
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._work, name="ogls-outbox", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], object]) -> None:
        """Adds a call to the queue. It returns at once and never raises."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self.lose("the queue is full")

    def lose(self, reason: str) -> None:
        """Counts one lost call."""
        with self._lock:
            self.lost += 1
            first, self.error = self.error is None, self.error or reason
        if first:
            self._tell(reason)

    def close(self, timeout: float) -> None:
        """Waits up to `timeout` seconds for the calls in the queue; those not made by then are lost."""
        deadline = time.monotonic() + timeout
        try:
            self._calls.put(None, timeout=timeout)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass  # the thread is still alive, which the next line notices
        if self._thread.is_alive():
            self._abandoned = True
            self.lose(f"no answer within {timeout:.0f} s; about {self._calls.qsize()} calls were waiting")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None and not self._abandoned:
            try:
                call()
            except Exception as error:  # whatever the other side does, the run goes on
                self.lose(f"{type(error).__name__}: {str(error)[:300]}")
