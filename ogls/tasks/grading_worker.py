"""The grading pool's own process imports the verifier once, and forks workers that run it.

    python -m ogls.tasks.grading_worker FD        FD is a Unix socket to the pool

The pool sends the pickled verifier and the limits, then a request for each worker that it wants: the process id of the
one to replace, or 0. It gets back a process id and a socket to the new worker. Forking takes milliseconds where
importing sympy again would take seconds. When the pool's end of the socket closes, all workers are killed.
A worker reads chunks of answers as JSON lines and writes one verdict a line, as soon as it has it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import fields
from typing import Any

from ogls.records import Problem
from ogls.tasks.answers import printable
from ogls.tasks.base import Verifier

PROBLEM_FIELDS = tuple(option.name for option in fields(Problem))
UNJUDGED = "It could not be judged."
"""This is the feedback on a text whose grading crashed or ran out of time."""
_LONGEST_FEEDBACK, _LONGEST_ERROR = 2000, 200  # characters
REQUEST = struct.Struct("!q")
"""A request is the process id of a worker to replace, or 0 for one more."""

_FORBIDDEN = ("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "signal.", "mmap.")
_ALLOWED = ("os.listdir", "os.scandir")  # the import system reads folders


def serve(control: socket.socket) -> None:
    """Loads the verifier, then forks a worker at each request until the pool is gone."""
    with control.makefile("rb") as stream:
        verifier, kinds, timeout, memory_gib = pickle.load(stream)
        assert isinstance(verifier, Verifier)
        logging.disable(logging.CRITICAL)
        verifier.warm_up(kinds)
        control.sendall(json.dumps(sorted(sys.modules)).encode() + b"\n")
        workers: set[int] = set()
        try:
            while len(request := stream.read(REQUEST.size)) == REQUEST.size:
                (replaced,) = REQUEST.unpack(request)
                if replaced in workers:
                    _end(replaced)
                    workers.remove(replaced)
                ours, theirs = socket.socketpair()
                process = os.fork()
                if process == 0:
                    ours.close()
                    stream.close()  # it has the socket, too: a worker that kept it would hide the nursery's end
                    control.close()
                    _work(theirs, verifier, timeout, memory_gib)
                workers.add(process)
                socket.send_fds(control, [REQUEST.pack(process)], [ours.fileno()])
                ours.close()
                theirs.close()
        finally:
            for process in workers:
                _end(process)


def _end(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def _work(connection: socket.socket, verifier: Verifier, timeout: float, memory_gib: float) -> None:
    """Grades until the pool closes the connection; never returns."""
    try:
        _confine(memory_gib)
        for line in connection.makefile("rb"):
            for *values, text in json.loads(line):
                problem = Problem(**dict(zip(PROBLEM_FIELDS, values, strict=True)))
                signal.alarm(math.ceil(timeout) + 2)  # ends an orphan; the pool itself is quicker
                reply = json.dumps(_grade(verifier, problem, text))
                signal.alarm(0)
                connection.sendall(reply.encode() + b"\n")
    finally:
        os._exit(0)


def _grade(verifier: Verifier, problem: Problem, text: str) -> tuple[bool, str, Any, str, str]:
    try:
        verdict = verifier.grade(problem, text)
        feedback = printable(verdict.feedback, _LONGEST_FEEDBACK)
    except MemoryError:
        os._exit(1)  # what is left of the heap is in no state to go on with
    except Exception as error:
        return False, "crash", None, UNJUDGED, printable(f"{type(error).__name__}: {error}", _LONGEST_ERROR)
    return verdict.correct, verdict.status, verdict.answer, feedback, ""


def _confine(memory_gib: float) -> None:
    """Takes terminal, writing, processes, network and memory away.

    The audit hook stops Python code that got evaluated by mistake; it is a second wall, not a sandbox for machine code.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def forbid(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes or (event.startswith(_FORBIDDEN) and event not in _ALLOWED):
            raise PermissionError(f"not allowed while grading: {event}")

    sys.addaudithook(forbid)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as pool:
        serve(pool)
        os._exit(0)  # tearing down the modules would take most of a second
