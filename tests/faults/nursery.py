"""Processes to kill or to run, forked in milliseconds from one that has imported all that takes seconds to import.

python -m tests.faults.nursery     reads lines of JSON [function of victims, argument, ...], writes process ids
"""

from __future__ import annotations

import gc
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Nursery:
    """Forks victims and tells how they ended."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._asked = 0
        self._answer()  # all is imported: from here on a victim's time is its own

    def _ask(self, *request: object) -> int:
        assert self._process.stdin is not None
        self._asked += 1
        self._process.stdin.write(json.dumps([self._asked, *request]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        """To the latest question: a test that ran out of time leaves others unread."""
        assert self._process.stdout is not None
        while True:
            question, answer = json.loads(self._process.stdout.readline())
            if question == self._asked:
                return answer

    def fork(self, function: str, *arguments: object) -> int:
        """Process id of a victim that has begun with `function`."""
        return self._ask("fork", function, *map(str, arguments))

    def wait(self, process: int) -> int:
        """Its exit code; -9 after a kill."""
        return self._ask("wait", process)

    def run(self, folder: Path, environment: Mapping[str, str], *arguments: str) -> tuple[int, str]:
        """Exit code and output of experiments/run.py, called in `folder`."""
        output = folder / "output.txt"
        code = self.wait(self.fork("run", folder, output, json.dumps(environment), *arguments))
        return code, output.read_text()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def serve() -> None:
    from ogls.system.startup import defer_torchmetrics

    defer_torchmetrics()
    # What a run imports as it goes takes longer than the run.
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import ogls.cli  # noqa: F401
    from tests.faults import victims

    torch.set_num_threads(1)
    _copy_databases()
    gc.freeze()  # or each victim would look through all that was imported for garbage, again and again
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what victims print is not an answer
    print(json.dumps([0, os.getpid()]), file=answers, flush=True)
    for line in sys.stdin:
        question, request, *arguments = json.loads(line)
        if request == "fork":
            answer = os.fork()
            if answer == 0:
                _be(getattr(victims, arguments[0]), arguments[1:])
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(int(arguments[0]), 0)[1])
        print(json.dumps([question, answer]), file=answers, flush=True)


def _copy_databases() -> None:
    """Has new databases of MLflow be copies of one: a second and a half of migrations each would be most of a run."""
    import mlflow.store.db.utils as databases
    import sqlalchemy

    made = databases._initialize_tables
    with tempfile.TemporaryDirectory() as folder:
        engine = sqlalchemy.create_engine(f"sqlite:///{folder}/made.db")
        made(engine)
        engine.dispose()
        with closing(sqlite3.connect(f"{folder}/made.db")) as first:
            empty = first.serialize()

    def copied(engine: sqlalchemy.Engine) -> None:
        if engine.dialect.name != "sqlite":
            return made(engine)
        with closing(sqlite3.connect(":memory:")) as source, closing(engine.raw_connection()) as target:
            source.deserialize(empty)
            source.backup(target.driver_connection)

    databases._initialize_tables = copied


def _be(victim, arguments) -> None:
    try:
        victim(*arguments)
    except SystemExit:
        raise  # ends as any program does, with whatever may keep it from that
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    serve()
