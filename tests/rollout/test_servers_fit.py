"""A run whose rollouts come from servers, through the command line: it begins, loses servers, and ends or says why."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ogls.policy.lora import Lora
from tests.faults.arena import _launched
from tests.faults.nursery import Nursery
from tests.rollout.fake_server import FakeServer, serving
from tests.test_cli import ENVIRONMENT, run_in, small

MATH = Lora(rank=16, alpha=32)  # of math.yaml


def arguments(tiny_model: Path, servers: Sequence[FakeServer], folder: Path, *further: str) -> list[str]:
    urls = "[" + ",".join(server.url for server in servers) + "]"
    given = ["--data.engine", "VllmServers", "--data.engine.urls", urls, "--data.engine.folder", str(folder)]
    return [*small(tiny_model), *given, "--data.engine.start_within", "5", "--trainer.max_epochs", "1", *further]


def rows(folder: Path) -> list[dict[str, Any]]:
    (run,) = (folder / "runs").iterdir()
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "train/loss" in row]


def test_servers_sample_beside_the_training(nursery: Nursery, tiny_model: Path, tmp_path: Path) -> None:
    further = ("--config", "one_step_off.yaml", "--trainer.max_epochs", "2")
    with serving(tiny_model, 1, MATH, context_length=256) as servers:
        given = arguments(tiny_model, servers, tmp_path)
        code, said = run_in(nursery, "fit", *given[:2], *further[:2], *given[2:], *further[2:], cwd=tmp_path)
    assert code == 0, said[-3000:]
    assert [row["train/staleness"] for row in rows(tmp_path)] == [0.0, 1.0, 1.0, 1.0]
    assert all(row["train/servers"] == 1.0 for row in rows(tmp_path))
    assert all("time/wait" in row for row in rows(tmp_path)[1:])


@pytest.mark.fault("server dies")
def test_two_processes_share_servers_of_which_one_dies(nursery: Nursery, tiny_model: Path, tmp_path: Path) -> None:
    """As one process with one server makes it."""
    made, said = {}, ""
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        with serving(tiny_model, size, MATH, context_length=256) as servers:
            if size == 2:
                servers[1].dies_at = 14  # amid the rollouts of a step: 5 problems were validated before
            processes = started(nursery, folder, size, arguments(tiny_model, servers, folder))
            codes = [nursery.wait(process) for process in processes]
            said = "".join((folder / f"output-{rank}.txt").read_text() for rank in range(size))
            assert codes == [0] * size, said[-3000:]
        made[size] = rows(folder)
        assert all(row["engine/canary_gap"] < 1e-3 for row in made[size])
        assert all(row["train/engine_logprob_gap"] < 1e-3 for row in made[size])
    for one, two in zip(made[1], made[2], strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], abs=1e-5)
        assert one["train/servers"] == 1.0
    assert made[2][-1]["train/servers"] == 1.0
    assert said.count("is left out until the next weights") == 1  # process 0 alone speaks with servers


@pytest.mark.slow
@pytest.mark.fault("kill -9 of the trainer")
@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_of_two_processes_is_killed_both_end(
    killed: int, nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    with serving(tiny_model, 1, MATH, context_length=256) as servers:
        processes = started(nursery, tmp_path, 2, arguments(tiny_model, servers, tmp_path))
        while servers[0].drawn < 10:
            time.sleep(0.02)
        began = time.monotonic()
        os.kill(processes[killed], 9)
        assert nursery.wait(processes[1 - killed]) not in (0, -9)
        assert time.monotonic() - began < 60
        assert nursery.wait(processes[killed]) == -9


def started(nursery: Nursery, folder: Path, size: int, given: Sequence[str], strategy: str = "ddp") -> list[int]:
    """Process ids of a run of so many processes."""
    port, devices = free_port(), ("--trainer.strategy", strategy, "--trainer.devices", str(size))
    processes = []
    for rank in range(size):
        environment = json.dumps(ENVIRONMENT | (_launched(rank, size, port) if size > 1 else {}))
        command = ("fit", *given, *(devices if size > 1 else ()))
        processes.append(nursery.fork("run", folder, folder / f"output-{rank}.txt", environment, *command))
    return processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def exit_of(nursery: Nursery, folder: Path, given: Sequence[str]) -> tuple[int, str]:
    code, said = run_in(nursery, "fit", *given, cwd=folder)
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    return code, line


def test_what_cannot_work_ends_with_one_line(
    nursery: Nursery, tiny_model: Path, tiny_qwen3: Path, tmp_path: Path
) -> None:
    with serving(tiny_qwen3, 1, MATH, context_length=256) as servers:
        given = arguments(tiny_model, servers, tmp_path)
        code, line = exit_of(nursery, tmp_path, given)
        assert (code, "serves the model 'ogls-" in line) == (2, True), line
    code, line = exit_of(nursery, tmp_path, [*given, "--data.engine.start_within", "0.3"])
    assert (code, f"no answer from {servers[0].url} within 0.3 s" in line) == (75, True), line


@pytest.mark.slow
@pytest.mark.fault("server dies")
def test_a_run_ends_where_none_comes_back_and_goes_on_where_one_does(
    nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    with serving(tiny_model, 1, MATH, context_length=256) as servers:
        servers[0].dies_at = 14
        given = arguments(tiny_model, servers, tmp_path)
        code, line = exit_of(nursery, tmp_path, [*given, "--data.engine.start_within", "1"])
        assert (code, "could not be rebuilt: EngineFailed: no answer from" in line) == (75, True), line
        servers[0] = servers[0].again()
        servers[0].dies_at = 14

        def supervised() -> None:
            while not servers[0].dead:
                threading.Event().wait(0.05)
            servers[0] = servers[0].again()

        threading.Thread(target=supervised, daemon=True).start()
        code, said = run_in(nursery, "fit", *given, "--data.engine.start_within", "20", cwd=tmp_path)
        assert code == 0, said[-3000:]
        assert "The engine failed and is rebuilt: ServerFailed" in said
