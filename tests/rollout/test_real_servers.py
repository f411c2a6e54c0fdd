"""Real vLLM servers under their supervisors: each route of weights, and each row of the table of what may fail."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch

from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.records import Sampling
from ogls.rollout.guard import EngineGuard
from ogls.rollout.server import FRESH, Server, ServerFailed
from ogls.rollout.servers import VllmServers
from ogls.tracking.files import read_trace
from tests.faults.nursery import Nursery
from tests.rollout.gap import logprob_gap
from tests.rollout.test_servers_fit import rows, started
from tests.test_cli import run_in, small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.timeout(1800),  # a server starts in one to four minutes on two cores
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the extra cpu or cuda"),
    pytest.mark.filterwarnings("default"),  # vLLM's own
]
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [100, 101] * 20, [9], [200, 3], [17, 18, 19, 20]]
SAMPLING = Sampling(max_tokens=24, temperature=0.8)


class Supervised:
    """A server that comes back."""

    def __init__(self, model: Path, place: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", place / f"server-{self.port}.log"
        engine = ("--data.engine", "VllmEngine", "--data.engine.dtype", "float32", "--data.engine.memory_gib", "0.25")
        settings = [word for word in small(model) if word not in ("--data.engine", "TransformersEngine")]
        command = [sys.executable, str(ROOT / "experiments/serve.py"), *settings, *engine, "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=place, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    @property
    def vllm(self) -> list[psutil.Process]:
        """All processes of vLLM, those that started others first."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def all(self, number: signal.Signals) -> None:
        for process in self.vllm:
            os.kill(process.pid, number)

    def wait(self) -> None:
        one, deadline = Server(self.url), time.monotonic() + 900
        while not one.well():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(1.0)


@pytest.fixture(scope="module")
def servers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Supervised]]:
    made = [Supervised(tiny_model, tmp_path_factory.mktemp("servers")) for _ in range(2)]
    try:
        for server in made:
            server.wait()
        yield made
    finally:
        for server in made:
            server.process.terminate()
        for server in made:
            server.process.wait(60)
    for server in made:
        with pytest.raises(ServerFailed):
            Server(server.url).call("GET", "/health", within=2.0)


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    torch.manual_seed(0)
    return Policy(str(tiny_model), lora=Lora(rank=16, alpha=32), dtype="float32").load()


@pytest.fixture
def made(servers: list[Supervised], tmp_path: Path) -> Iterator[Callable[..., tuple[EngineGuard, VllmServers]]]:
    engines = []

    def make(policy: Policy, **settings: Any) -> tuple[EngineGuard, VllmServers]:
        settings = {"answer_within": 20.0, "start_within": 900.0, "folder": str(tmp_path)} | settings
        engine = VllmServers([server.url for server in servers], **settings)
        engine.adapter_rank = policy.adapter_rank
        engines.append(engine)
        guard = EngineGuard(engine)
        guard.start(policy.folder, 256)
        guard.load(policy, 0)
        guard.generate(PROMPTS, SAMPLING, 2, seed=0)
        assert len(engine.alive) == 2
        return guard, engine

    yield make
    for engine in engines:
        engine.close()


def shift(policy: Policy) -> None:
    for p in policy.trainable().values():
        p.data += 0.05 * torch.randn_like(p)


@pytest.mark.parametrize("sync", ["adapter", "files", "transfer"])
def test_servers_draw_from_the_policy_after_every_change(
    sync: Literal["adapter", "files", "transfer"], policy: Policy, made: Any, record_property: Callable[..., None]
) -> None:
    guard, engine = made(policy, sync=sync)
    gaps = [max(guard.gaps.values())]
    for version in (1, 2):
        shift(policy)
        stale = logprob_gap(engine, policy, PROMPTS, 16)
        guard.load(policy, version)
        gaps.append(max(guard.gaps.values()))
        assert stale > 0.05 > 10 * gaps[-1]
    record_property("figure", f"{sync}: {gaps[-1]:.4f}, before {stale:.4f}")
    drawn, again, other = (guard.generate(PROMPTS, SAMPLING, 4, seed=seed) for seed in (5, 5, 6))
    assert [[c.token_ids for c in g] for g in drawn] == [[c.token_ids for c in g] for g in again]
    assert drawn != other
    assert all(len({c.token_ids for c in group}) == 4 for group in drawn)


def test_all_weights_arrive(tiny_model: Path, made: Any) -> None:
    full = Policy(str(tiny_model), lora=None, dtype="float32").load()
    guard, _ = made(full)
    for p in full.trainable().values():
        p.data += 0.02 * torch.randn_like(p)
    guard.load(full, 1)
    assert max(guard.gaps.values()) < 0.005
    fresh = Policy(str(tiny_model), lora=None, dtype="float32").load()
    guard.load(fresh, 2)  # for the tests that come after this one


def run_with(server: Supervised, model: Path, folder: Path, *further: str) -> list[str]:
    """A run of three steps in `folder` whose rollouts come from one server."""
    settings = [word for word in small(model) if word not in ("--data.engine", "TransformersEngine")]
    engine = ("--data.engine", "VllmServers", "--data.engine.urls", f"[{server.url}]")
    return [
        *(*settings[:2], *further, *settings[2:], *engine, "--data.engine.folder", str(folder)),
        *("--data.engine.start_within", "900", "--data.steps_per_epoch", "3", "--trainer.max_epochs", "1"),
        *("--data.max_tokens", "100", "--data.context_length", "256"),
    ]


def sound(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 3
    assert max(row["engine/canary_gap"] for row in rows) < 0.1
    assert max(row["train/engine_logprob_gap"] for row in rows) < 0.05


def test_a_server_samples_beside_the_training(
    servers: list[Supervised], nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    given = run_with(servers[0], tiny_model, tmp_path, "--config", "one_step_off.yaml")
    code, said = run_in(nursery, "fit", *given, cwd=tmp_path)
    assert code == 0, said[-3000:]
    sound(rows(tmp_path))
    assert [row["train/staleness"] for row in rows(tmp_path)] == [0.0, 1.0, 1.0]
    (trace,) = (tmp_path / "runs").glob("*/trace.json")
    phases = read_trace(trace)
    for step in (1, 2):  # while a step trains, the rollouts of the next one are drawn
        drawn, trained = (
            [(phase.start, phase.end) for phase in phases if phase.name in names and phase.step == of]
            for names, of in ((("generate",), step + 1), (("teacher", "student"), step))
        )
        assert any(a < d and c < b for a, b in drawn for c, d in trained), (step, drawn, trained)


@pytest.mark.fault("server is silent")
def test_a_frozen_server_is_left_out_and_comes_back(servers: list[Supervised], policy: Policy, made: Any) -> None:
    guard, engine = made(policy)
    servers[1].all(signal.SIGSTOP)
    try:
        assert len(guard.generate(PROMPTS, SAMPLING, 2, seed=1)) == len(PROMPTS)
        assert [server.url for server in engine.alive] == [servers[0].url]
    finally:
        servers[1].all(signal.SIGCONT)
    shift(policy)
    guard.load(policy, 1)
    assert len(engine.alive) == 2
    assert max(guard.gaps.values()) < 0.005


@pytest.mark.fault("weights in the engine are not the policy's")
def test_foreign_weights_are_refused(
    servers: list[Supervised], policy: Policy, made: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file is put in the place of the adapter for the second server alone."""
    guard, engine = made(policy)
    other = Policy(str(tiny_model), lora=policy.lora, dtype="float32").load()
    for p in other.trainable().values():
        p.data += 0.2
    call = Server.call

    def sabotaged(self: Server, verb: str, path: str, body: Any = None, within: float = 600.0) -> Any:
        if self.url == servers[1].url and path == "/v1/load_lora_adapter":
            body = body | {"lora_path": str(Path(body["lora_path"]).parent / "foreign")}
            other.save_adapter(body["lora_path"])
        return call(self, verb, path, body, within)

    monkeypatch.setattr(Server, "call", sabotaged)
    guard.load(policy, 1)
    assert [server.url for server in engine.alive] == [servers[0].url]
    monkeypatch.undo()
    guard.load(policy, 2)
    assert len(engine.alive) == 2


@pytest.mark.fault("server dies")
def test_a_killed_server_is_left_out_is_started_again_and_gets_all_weights(
    servers: list[Supervised], policy: Policy, made: Any
) -> None:
    guard, engine = made(policy, sync="files")
    expected = guard.generate(PROMPTS, SAMPLING, 2, seed=1)
    shift(policy)
    guard.load(policy, 1)
    servers[1].all(signal.SIGKILL)
    assert len(guard.generate(PROMPTS, SAMPLING, 2, seed=1)) == len(PROMPTS)
    assert [server.url for server in engine.alive] == [servers[0].url]
    servers[1].wait()
    assert Server(servers[1].url).version() == FRESH
    guard.load(policy, 2)
    assert len(engine.alive) == 2
    assert max(guard.gaps.values()) < 0.005
    assert guard.generate(PROMPTS, SAMPLING, 2, seed=1) != expected


@pytest.mark.fault("server dies")
def test_where_all_are_killed_the_run_waits_for_them(servers: list[Supervised], policy: Policy, made: Any) -> None:
    """One by a kill, the other by an update of its weights that breaks off, which ends vLLM at its next request."""
    guard, engine = made(policy, sync="files")
    expected = guard.generate(PROMPTS, SAMPLING, 2, seed=1)
    broken = Server(servers[1].url)
    broken.call("POST", "/init_weight_transfer_engine", {"init_info": {}})
    broken.call("POST", "/start_weight_update")
    with pytest.raises(ServerFailed):
        broken.call("POST", "/update_weights", {"update_info": {"folder": "/nowhere"}})
    servers[0].all(signal.SIGKILL)
    drawn = guard.generate(PROMPTS, SAMPLING, 2, seed=1)
    assert [[c.token_ids for c in g] for g in drawn] == [[c.token_ids for c in g] for g in expected]
    assert engine.alive
    assert max(guard.gaps.values()) < 0.005
    for server in servers:
        server.wait()
    guard.load(policy, 1)
    assert len(engine.alive) == 2


@pytest.mark.fault("server dies")
def test_two_processes_with_parts_of_the_weights_share_a_server_that_dies(
    servers: list[Supervised], nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    """All weights are trained, so this comes last: adapters fit what a server began with. It is killed amid the run."""
    given = run_with(servers[0], tiny_model, tmp_path, "--policy.lora", "null")
    processes = started(nursery, tmp_path, 2, given, "sharded")
    while not [*(tmp_path / "runs").glob("*/metrics.jsonl")] or not rows(tmp_path):
        time.sleep(0.1)
    servers[0].all(signal.SIGKILL)
    codes = [nursery.wait(process) for process in processes]
    said = "".join((tmp_path / f"output-{rank}.txt").read_text() for rank in range(2))
    assert codes == [0, 0], said[-3000:]
    assert "The engine failed and is rebuilt" in said
    sound(rows(tmp_path))
