"""A grading pool gives verdicts on untrusted text in processes that can be killed.

A process pool of a library would be shorter but for what it does not do: it would read pickles that a worker wrote,
run the main script again in every worker, and wait for ever for a stopped process.
"""

from __future__ import annotations

import json
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence

import psutil

from ogls.records import Problem, Verdict
from ogls.tasks.base import Verifier
from ogls.tasks.grading_worker import PROBLEM_FIELDS, REQUEST, UNJUDGED

_CHUNK = 64
_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR")
_LOADING, _PATIENCE = 120.0, 10.0  # seconds: to load the verifier; to answer a request or to end
_ASKED_AGAIN = 2  # times, for an answer whose worker was stopped or died of something else
_HASTE = 10  # times less time for an answer once the budget for time-outs is spent


class GradingPool:
    """A grading pool runs a verifier in processes, each of which may end at any time without anyone noticing.

    An answer that takes longer than `timeout` seconds is "timeout", one that ends its process or raises is "crash";
    both are wrong, and the worker is replaced in milliseconds. An answer is not to blame, but asked again, where its
    worker was stopped, was dead before it heard of it, or went down with the process that all are forked from.
    Any thread may call `grade`; calls take turns. Of the environment, workers see PATH and locale only; they never
    import torch. Nothing runs before the first `grade`, which loads what problems of its kinds need.

    Args:
        verifier: verifier to run, whose class is importable by name
        workers: number of processes
        timeout: seconds of wall-clock time that an answer may take
        memory_gib: address space of one worker; what needs more is a "crash"
        timeout_budget: seconds that time-outs of one `grade` may take in all; from there on an answer has a tenth of
            `timeout`, so that a batch of answers that never end cannot hold up training
    """

    def __init__(
        self,
        verifier: Verifier,
        workers: int = 1,
        timeout: float = 3.0,
        memory_gib: float = 2.0,
        timeout_budget: float = 30.0,
    ):
        if workers < 1 or timeout <= 0 or memory_gib < 0.5 or timeout_budget < 0:
            raise ValueError(
                "expected workers >= 1, timeout > 0 and memory_gib >= 0.5, timeout_budget >= 0, "
                f"got workers {workers}, timeout {timeout}, memory_gib {memory_gib}, timeout_budget {timeout_budget}"
            )
        self.verifier, self.workers, self.timeout, self.memory_gib = verifier, workers, timeout, memory_gib
        self.timeout_budget = timeout_budget
        self._lock = threading.RLock()
        self._nursery: _Nursery | None = None
        self._kinds = set[str]()  # of problem that the nursery has loaded
        self._idle: list[_Worker] = []
        self._again = Counter[int]()  # how often an answer of this call was asked again
        self.timeout_seconds = 0.0
        """Seconds that time-outs of the latest call of `grade` took."""

    def grade(self, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Returns one verdict for each (problem, text), in order."""
        kinds = {problem.kind for problem, _ in answers}
        with self._lock:
            if not kinds <= self._kinds:
                self._kinds |= kinds
                self.close()
            self._start()
            waiting = deque(range(len(answers)))
            chunk = max(1, min(_CHUNK, len(answers) // (2 * self.workers)))
            verdicts: dict[int, Verdict] = {}
            self._again, self.timeout_seconds = Counter[int](), 0.0
            with selectors.DefaultSelector() as busy:
                try:
                    while len(verdicts) < len(answers):
                        while waiting and len(busy.get_map()) < self.workers:
                            worker = self._idle.pop() if self._idle else self._fork()
                            busy.register(worker.connection, selectors.EVENT_READ, worker)
                            some = [waiting.popleft() for _ in range(min(chunk, len(waiting)))]
                            worker.send(some, answers, self._limit)
                        self._collect(busy, waiting, verdicts)
                except BaseException:  # an interrupt: no half-read connection may be used again
                    self._idle += [key.data for key in busy.get_map().values()]
                    self.close()
                    raise
        return [verdicts[index] for index in range(len(answers))]

    @property
    def modules(self) -> list[str] | None:
        """Returns what the workers have imported; None before the first answer was graded."""
        return None if self._nursery is None else self._nursery.modules

    def close(self) -> None:
        """Ends all processes. Grading again starts new ones."""
        with self._lock:
            for worker in self._idle:
                worker.connection.close()
            self._idle.clear()
            if self._nursery is not None:
                self._nursery.close()
                self._nursery = None

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        if self._nursery is None:
            self._nursery = _Nursery(self.verifier, sorted(self._kinds), self.timeout, self.memory_gib)
            weakref.finalize(self, self._nursery.close)

    def _collect(self, busy: selectors.BaseSelector, waiting: deque[int], verdicts: dict[int, Verdict]) -> None:
        """Takes in what workers have said by the earliest deadline; replaces those that died or ran out of time."""
        running: list[_Worker] = [key.data for key in busy.get_map().values()]
        earliest = min(worker.deadline for worker in running)
        ready = {key.data for key, _ in busy.select(max(0.0, earliest - time.monotonic()))}
        if time.monotonic() > earliest + max(1.0, self.timeout):  # this process was stopped, and perhaps all of them
            for worker in running:
                worker.deadline = time.monotonic() + self.timeout
        for worker in running:
            alive = worker.receive(verdicts, self._limit) if worker in ready else True
            if alive and worker.pending and time.monotonic() < worker.deadline:
                continue
            busy.unregister(worker.connection)
            if alive and not worker.pending:
                self._idle.append(worker)
                continue
            if worker.pending and not self._ask_again(worker):  # the first is to blame, the others are not
                status = "timeout" if alive else "crash"
                self.timeout_seconds += worker.limit if alive else 0
                verdicts[worker.pending.popleft()] = Verdict(correct=False, status=status, feedback=UNJUDGED)
            if worker.pending:
                waiting.extendleft(reversed(worker.pending))
            worker.connection.close()
            self._idle.append(self._fork(replaced=worker.process))

    @property
    def _limit(self) -> float:
        """Returns the seconds that the next answer has."""
        return self.timeout if self.timeout_seconds < self.timeout_budget else self.timeout / _HASTE

    def _fork(self, replaced: int = 0) -> _Worker:
        assert self._nursery is not None
        try:
            return _Worker(self._nursery, replaced, self.timeout)
        except OSError:  # the nursery itself is gone or stopped, and its workers with it: once more from the beginning
            self.close()
            self._start()
            assert self._nursery is not None
            try:
                return _Worker(self._nursery, 0, self.timeout)
            except OSError as error:
                raise RuntimeError(f"the grading process does not answer: {error!r}") from error

    def _ask_again(self, worker: _Worker) -> bool:
        """Returns whether the first pending answer of a worker that died or ran out of time is not to blame for it."""
        first = worker.pending[0]
        innocent = not worker.delivered or worker.nursery is not self._nursery or _is_stopped(worker.process)
        self._again[first] += innocent
        return innocent and self._again[first] <= _ASKED_AGAIN


class _Nursery:
    """The nursery is the process that has imported the verifier and forks workers."""

    def __init__(self, verifier: Verifier, kinds: Sequence[str], timeout: float, memory_gib: float):
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_LOADING)
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment |= {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}
        with theirs:
            # A session of its own: Ctrl-C is for the trainer, which ends this process by closing the socket.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ogls.tasks.grading_worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._control.sendall(pickle.dumps((verifier, kinds, timeout, memory_gib)))
        self.modules: list[str] | None = None

    def fork(self, replaced: int) -> tuple[socket.socket, int]:
        """Returns connection and process id of a new worker. The first call waits until the verifier is loaded."""
        if self.modules is None:
            with self._control.makefile("rb", buffering=0) as stream:
                line = stream.readline()
            if not line:
                code = self._process.wait()
                raise RuntimeError(
                    f"the grading process could not load the verifier (exit code {code}); see its message"
                )
            self.modules = json.loads(line)
            self._control.settimeout(_PATIENCE)
        self._control.sendall(REQUEST.pack(replaced))
        reply, descriptors, _, _ = socket.recv_fds(self._control, REQUEST.size, 1, socket.MSG_CMSG_CLOEXEC)
        if not descriptors:
            raise ConnectionError("the grading process is gone")
        return socket.socket(fileno=descriptors[0]), REQUEST.unpack(reply)[0]

    def close(self) -> None:
        """Ends it and its workers, also where they are stopped."""
        self._control.close()
        try:
            self._process.wait(0 if _is_stopped(self._process.pid) else _PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class _Worker:
    """A worker, seen from the pool, is a connection and the answers that it was given."""

    def __init__(self, nursery: _Nursery, replaced: int, timeout: float):
        self.nursery = nursery
        self.connection, self.process = nursery.fork(replaced)
        self.connection.settimeout(timeout)
        self.delivered = True
        self.pending: deque[int] = deque()
        self.deadline = time.monotonic() + timeout
        self.limit = timeout
        self._unread = b""

    def send(self, indices: Sequence[int], answers: Sequence[tuple[Problem, str]], limit: float) -> None:
        """Hands over a chunk of answers with `limit` seconds each.

        The worker reads all of it before it writes, so neither side can block the other.
        """
        chunk = [[*(getattr(answers[i][0], name) for name in PROBLEM_FIELDS), answers[i][1]] for i in indices]
        self.pending.extend(indices)
        try:
            self.connection.sendall(json.dumps(chunk).encode() + b"\n")
        except OSError:  # it died or was stopped while idle: `receive` or the deadline, which is now, will see that
            self.delivered = False
        self.limit = limit
        self.deadline = time.monotonic() + (limit if self.delivered else 0)

    def receive(self, verdicts: dict[int, Verdict], limit: float) -> bool:
        """Reads finished verdicts; returns False when the worker is dead. The next answer has `limit` seconds."""
        try:
            received = self.connection.recv(1 << 16)
        except OSError:
            return False
        *lines, self._unread = (self._unread + received).split(b"\n")
        for line in lines:
            correct, status, answer, feedback, error = json.loads(line)
            verdict = Verdict(correct=correct, status=status, answer=answer, feedback=feedback, error=error)
            verdicts[self.pending.popleft()] = verdict
        if lines:
            self.limit = limit
            self.deadline = time.monotonic() + limit
        return bool(received)


def _is_stopped(process: int) -> bool:
    """Returns whether a process was told to stop, by SIGSTOP or a debugger."""
    try:
        return psutil.Process(process).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False
