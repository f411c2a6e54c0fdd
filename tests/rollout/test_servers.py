"""vLLM servers as one engine: the table of what may fail, row by row, against servers of the standard library."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ogls.policy.policy import Policy
from ogls.records import Sampling
from ogls.rollout import servers as module
from ogls.rollout import weight_files
from ogls.rollout.engine import prompt_seeds
from ogls.rollout.guard import EngineGuard
from ogls.rollout.server import FRESH, Server, ServerFailed, served_name
from ogls.rollout.servers import VllmServers
from ogls.rollout.transformers import TransformersEngine
from ogls.rollout.weight_files import new_folder, write_weights
from ogls.system.exits import EngineFailed
from tests.rollout.fake_server import LORA, FakeServer, serving
from tests.rollout.gap import logprob_gap

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [100, 101] * 20, [5, 6, 7], [9]]
SAMPLING = Sampling(max_tokens=5, temperature=0.8)


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    torch.manual_seed(0)
    return Policy(str(tiny_model), lora=LORA, dtype="float32").load()


@pytest.fixture
def full(tiny_model: Path) -> Policy:
    return Policy(str(tiny_model), lora=None, dtype="float32").load()


def shift(policy: Policy, seed: int = 1, size: float = 0.05) -> None:
    torch.manual_seed(seed)
    for p in policy.trainable().values():
        p.data += size * torch.randn_like(p)


def engine_of(servers: list[FakeServer], folder: Path, **settings: Any) -> VllmServers:
    settings = {"answer_within": 20.0, "start_within": 5.0, "folder": str(folder)} | settings
    return VllmServers([server.url for server in servers], **settings)


Made = Callable[..., tuple[EngineGuard, VllmServers]]


@pytest.fixture
def made(tiny_model: Path, tmp_path: Path) -> Iterator[Made]:
    engines: list[VllmServers] = []

    def make(servers: list[FakeServer], policy: Policy, **settings: Any) -> tuple[EngineGuard, VllmServers]:
        engine = engine_of(servers, tmp_path, **settings)
        engine.adapter_rank = policy.adapter_rank
        engines.append(engine)
        guard = EngineGuard(engine)
        guard.start(tiny_model, 128)
        guard.load(policy, 0)
        return guard, engine

    yield make
    for engine in engines:
        engine.close()
    assert not list(tmp_path.glob("ogls-weights-*")), "files of weights are left behind"


def ids(groups: Any) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


# ---- weights arrive, by every route ----


@pytest.mark.parametrize("sync", ["adapter", "files"])
def test_servers_draw_from_the_policy_after_every_change(
    sync: str, tiny_model: Path, policy: Policy, made: Made
) -> None:
    with serving(tiny_model, 2) as servers:
        guard, engine = made(servers, policy, sync=sync)
        for version in range(2):
            guard.load(policy, version)
            guard.generate(PROMPTS, SAMPLING, 1, seed=0)  # with the canary of the first load
            assert set(guard.gaps) == {server.url for server in servers}
            assert max(guard.gaps.values()) < 1e-3
            assert logprob_gap(engine, policy, PROMPTS, 16) < 1e-3
            shift(policy)
            assert logprob_gap(engine, policy, PROMPTS, 16) > 0.01  # the test can tell old weights from new ones
        for fake in servers:
            assert len(fake.adapters) == (1 if sync == "adapter" else 0), "old adapters are unloaded"
            given = "/v1/load_lora_adapter" if sync == "adapter" else "/collective_rpc"
            order = [path for path in fake.orders if path != "/v1/unload_lora_adapter"][-5:]
            after = ["/reset_prefix_cache", "/update_weight_version", "/resume"]
            assert order == ["/pause?mode=abort", given, *after]


def test_all_weights_arrive(tiny_model: Path, full: Policy, made: Made) -> None:
    with serving(tiny_model, 1, lora=None) as servers:
        guard, engine = made(servers, full)
        shift(full, size=0.02)
        guard.load(full, 1)
        assert logprob_gap(engine, full, PROMPTS, 16) < 1e-3


def test_weights_are_on_the_disk_before_anybody_is_told(
    tiny_model: Path, policy: Policy, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    sync, call = weight_files._sync, Server.call
    monkeypatch.setattr(weight_files, "_sync", lambda path: (told.append(path.name), sync(path))[1])
    monkeypatch.setattr(
        Server, "call", lambda self, verb, path, *a, **k: (told.append(path), call(self, verb, path, *a, **k))[1]
    )
    with serving(tiny_model) as servers:
        _, engine = made(servers, policy, sync="files")
        assert engine.alive
    order = told.index("/collective_rpc")
    (first, folder, above) = (name for name in told[:order] if not name.startswith("/"))
    assert first == "model-00000.safetensors"
    assert folder.startswith("ogls-weights-")
    assert not above.startswith("ogls-weights-")


def test_large_weights_are_cut_into_files(tmp_path: Path) -> None:
    weights = {f"w{i}": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each
    write_weights(iter(weights.items()), tmp_path, part=100)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in files] == [["w0", "w1"], ["w2", "w3"], ["w4"]]
    read = {name: value for file in files for name, value in load_file(file).items()}
    assert all(torch.equal(read[name], value) for name, value in weights.items())


@pytest.mark.fault("kill -9 of the trainer")
def test_files_of_a_trainer_that_was_killed_are_removed(tmp_path: Path) -> None:
    host = socket.gethostname()
    gone, living, another = (tmp_path / f"ogls-weights-{name}-x" for name in (f"{host}-4194305", f"{host}-1", "else-9"))
    for folder in (gone, living, another):
        folder.mkdir()
    with new_folder(tmp_path) as made:
        assert Path(made).stat().st_mode & 0o777 == 0o755
        assert sorted(tmp_path.iterdir()) == sorted([living, another, Path(made)])


# ---- who draws does not matter ----


@pytest.mark.parametrize("number", [1, 2, 3])
def test_results_do_not_depend_on_who_draws(number: int, tiny_model: Path, policy: Policy, made: Made) -> None:
    shift(policy)
    with serving(tiny_model, number) as servers:
        guard, _ = made(servers, policy)
        drawn = guard.generate(PROMPTS, SAMPLING, 2, seed=9)
        assert ids(drawn) == ids(drawn_alone(policy))
        assert all(server.drawn > 0 for server in servers)
        assert drawn[0] != drawn[3]  # the same prompt twice is drawn twice
        assert ids(guard.generate(PROMPTS, SAMPLING, 2, seed=8)) != ids(drawn)


def drawn_alone(policy: Policy) -> Any:
    """By the seeds that each prompt has, one prompt at a time."""
    engine = TransformersEngine()
    engine.start(policy.folder, 128)
    engine.load(policy, 0)
    seeds = prompt_seeds(PROMPTS, 9)
    return [engine.generate([p], SAMPLING, 2, s % 2**62)[0] for p, s in zip(PROMPTS, seeds, strict=True)]


# ---- the table of failures ----


@pytest.mark.fault("server dies")
def test_the_prompts_of_a_server_that_dies_go_to_the_others(
    tiny_model: Path, policy: Policy, made: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(tiny_model, 3) as servers:
        guard, engine = made(servers, policy)
        expected = guard.generate(PROMPTS, SAMPLING, 2, seed=9)
        assert engine.metrics == {"train/servers": 3.0}
        servers[1].dies_at = servers[1].drawn + 1
        assert ids(guard.generate(PROMPTS, SAMPLING, 2, seed=9)) == ids(expected)
        assert engine.metrics == {"train/servers": 2.0}
        assert f"{servers[1].url} is left out" in capfd.readouterr().err
        servers[1] = servers[1].again()
        guard.load(policy, 1)  # it comes back, and is given all weights
        assert engine.metrics == {"train/servers": 3.0}
        assert servers[1].version == servers[0].version != FRESH
        assert ids(guard.generate(PROMPTS, SAMPLING, 2, seed=9)) == ids(expected)


@pytest.mark.fault("server is silent")
def test_a_frozen_server_is_left_out_and_comes_back(tiny_model: Path, policy: Policy, made: Made) -> None:
    with serving(tiny_model, 2) as servers:
        guard, engine = made(servers, policy, answer_within=1.0)
        expected = guard.generate(PROMPTS, SAMPLING, 2, seed=9)
        servers[0].freeze()
        began = time.monotonic()
        assert ids(guard.generate(PROMPTS, SAMPLING, 2, seed=9)) == ids(expected)
        assert time.monotonic() - began < 4.0, "its other prompts do not wait one after the other"
        assert [server.url for server in engine.alive] == [servers[1].url]
        servers[0].thaw()
        shift(policy)
        guard.load(policy, 1)
        assert len(engine.alive) == 2
        assert max(guard.gaps.values()) < 1e-3


@pytest.mark.fault("server dies")
def test_where_none_is_left_the_guard_waits_loads_and_asks_again_with_the_same_seed(
    tiny_model: Path, policy: Policy, made: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(tiny_model, 2) as servers:
        guard, engine = made(servers, policy)
        expected = guard.generate(PROMPTS, SAMPLING, 2, seed=9)
        shift(policy)
        guard.load(policy, 1)
        wanted = guard.generate(PROMPTS, SAMPLING, 2, seed=9)
        for fake in servers:
            fake.kill()
        timer = threading.Timer(1.0, lambda: servers.__setitem__(0, servers[0].again()))
        timer.start()
        assert ids(guard.generate(PROMPTS, SAMPLING, 2, seed=9)) == ids(wanted) != ids(expected)
        timer.join()
        assert [server.url for server in engine.alive] == [servers[0].url]  # the other may come later
        said = capfd.readouterr().err
        assert "The engine failed and is rebuilt: ServerFailed: none of" in said
        assert "Waiting up to 5 s for" in said


@pytest.mark.fault("server dies")
def test_where_none_comes_back_the_run_ends_with_the_engines_exit_code(
    tiny_model: Path, policy: Policy, made: Made
) -> None:
    with serving(tiny_model, 1) as servers:
        guard, _ = made(servers, policy, start_within=0.5)
        servers[0].kill()
        with pytest.raises(EngineFailed, match=r"could not be rebuilt: EngineFailed: no answer from http://127.*0.5 s"):
            guard.generate(PROMPTS, SAMPLING, 2, seed=9)


@pytest.mark.fault("weights in the engine are not the policy's")
def test_a_server_started_again_draws_nothing_before_it_has_the_weights(
    tiny_model: Path, policy: Policy, made: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(tiny_model, 2) as servers:
        guard, engine = made(servers, policy, sync="files")
        expected = guard.generate(PROMPTS, SAMPLING, 2, seed=9)
        servers[0] = servers[0].again()  # between two calls: nobody has noticed
        assert ids(guard.generate(PROMPTS, SAMPLING, 2, seed=9)) == ids(expected)
        assert len(engine.alive) == 1
        assert "with the weights {'default'}, expected " in capfd.readouterr().err


@pytest.mark.fault("weights in the engine are not the policy's")
@pytest.mark.parametrize("fault", ["deaf", "foreign", "another trainer's"])
def test_old_and_foreign_weights_are_refused(
    fault: str, tiny_model: Path, policy: Policy, made: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(tiny_model, 2) as servers:
        guard, engine = made(servers, policy)
        guard.generate(PROMPTS, SAMPLING, 1, seed=9)
        shift(policy, size=0.2)
        servers[1].deaf, servers[1].foreign = fault == "deaf", fault == "foreign"
        guard.load(policy, 1)
        if fault == "another trainer's":
            assert len(engine.alive) == 2
            servers[1].version = "another"
            guard.generate(PROMPTS, SAMPLING, 1, seed=9)
        assert [server.url for server in engine.alive] == [servers[0].url]
        said = capfd.readouterr().err
        wanted = "with the weights {'another'}" if fault == "another trainer's" else "does not sample from the policy"
        assert wanted in said
        assert said.count("left out") == 1
        assert "rebuilt" not in said


@pytest.mark.fault("weights in the engine are not the policy's")
def test_where_all_have_foreign_weights_the_run_ends(tiny_model: Path, policy: Policy, made: Made) -> None:
    with serving(tiny_model, 2) as servers:
        guard, _ = made(servers, policy)
        guard.generate(PROMPTS, SAMPLING, 1, seed=9)
        for fake in servers:
            fake.foreign = True
        with pytest.raises(EngineFailed, match="does not sample from the policy"):
            guard.load(policy, 1)


@pytest.mark.fault("server refuses")
@pytest.mark.parametrize("path", ["/pause?mode=abort", "/collective_rpc", "/update_weight_version", "/resume", "cache"])
def test_an_order_that_fails_is_not_given_again_and_leaves_the_server_out(
    path: str, tiny_model: Path, policy: Policy, made: Made
) -> None:
    with serving(tiny_model, 2) as servers:
        guard, engine = made(servers, policy, sync="files")
        guard.generate(PROMPTS, SAMPLING, 1, seed=9)
        before = len(servers[0].orders)
        servers[0].refused = {} if path == "cache" else {path: 500}
        servers[0].keeps_cache = path == "cache"
        guard.load(policy, 1)
        assert [server.url for server in engine.alive] == [servers[1].url]
        orders = servers[0].orders[before:]
        assert len(orders) == len(set(orders)), f"given twice: {orders}"
        assert "/resume" not in orders or path == "/resume"
        drawn = servers[0].drawn
        servers[0].refused, servers[0].keeps_cache = {}, False
        guard.load(policy, 2)
        assert servers[0].drawn > drawn, "after a broken order it has to draw before it gets weights"
        assert len(engine.alive) == 2


@pytest.mark.fault("server refuses")
def test_a_missing_file_is_an_error(
    tiny_model: Path, policy: Policy, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_model, 1) as servers:
        guard, _ = made(servers, policy, sync="files", start_within=0.5)
        monkeypatch.setattr(module, "write_weights", lambda weights, folder: None)
        with pytest.raises(EngineFailed, match=r"none of .* took the weights"):
            guard.load(policy, 1)


def test_a_key_is_sent(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    request = http.client.HTTPConnection.request

    def noted(self: Any, verb: str, path: str, body: Any = None, headers: Any = None) -> None:
        seen.append(headers.get("Authorization", ""))
        request(self, verb, path, body, headers)

    monkeypatch.setattr(http.client.HTTPConnection, "request", noted)
    with serving(tiny_model, 1) as servers:
        one = Server(servers[0].url)
        assert one.well()
        monkeypatch.setenv("VLLM_API_KEY", "planted")
        assert one.well()
    assert seen == ["", "Bearer planted"]


# ---- what cannot work is said in one line ----


@pytest.mark.parametrize(
    "urls",
    [
        [],
        ["127.0.0.1:8001"],
        ["https://a:1"],
        ["http://a"],
        ["http://a:x"],
        ["http://me:secret@a:1"],
        ["http://a:1/v1"],
    ],
)
def test_addresses_that_are_none_are_refused(urls: list[str]) -> None:
    with pytest.raises(ValueError, match=r"data.engine.urls: expected"):
        VllmServers(urls)


def test_one_address_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="one address per server"):
        VllmServers(["http://a:1", "http://a:1/"])


@pytest.mark.parametrize("settings", [{"answer_within": 0.0}, {"start_within": -1.0}])
def test_seconds_are_above_0(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"data.engine.\w+_within must be in"):
        VllmServers(["http://a:1"], **settings)


def test_another_model_and_too_few_tokens_are_refused(
    tiny_model: Path, tiny_qwen3: Path, tmp_path: Path, policy: Policy
) -> None:
    with serving(tiny_model, 1) as servers:
        engine = engine_of(servers, tmp_path)
        with pytest.raises(
            ValueError, match=r"serves the model 'ogls-\w{16}', the policy's is 'ogls-\w{16}': start it"
        ):
            engine.start(tiny_qwen3, 128)
        with pytest.raises(ValueError, match="holds 128 tokens, needed are 256"):
            engine.start(tiny_model, 256)
        servers[0].refused = {"/v1/models": 401}
        with pytest.raises(EngineFailed, match="gave 401"):
            engine.start(tiny_model, 128)
        servers[0].refused = {"/weight_info": 404}
        with pytest.raises(ValueError, match="takes no weights"):
            engine.start(tiny_model, 128)
        with pytest.raises(ValueError, match="there is no folder"):
            engine_of(servers, tmp_path / "nowhere").start(tiny_model, 128)
    assert served_name(tiny_model) != served_name(tiny_qwen3)


def test_a_policy_without_an_adapter_has_none_to_give(tiny_model: Path, full: Policy, made: Made) -> None:
    with serving(tiny_model, 1) as servers, pytest.raises(ValueError, match=r"has no adapter: set data\.engine\.sync"):
        made(servers, full, sync="adapter")


def test_who_is_never_there_ends_the_run(tiny_model: Path, tmp_path: Path) -> None:
    engine = VllmServers(["http://127.0.0.1:9"], start_within=0.3, folder=str(tmp_path))
    with pytest.raises(EngineFailed, match=r"no answer from http://127.0.0.1:9 within 0.3 s: is it started"):
        engine.start(tiny_model, 128)


def test_a_server_that_talks_nonsense_has_failed(tiny_model: Path) -> None:
    with serving(tiny_model, 1) as servers:
        one = Server(servers[0].url)
        servers[0]._draw = lambda body: {"choices": [{"index": 0}]}
        with pytest.raises(ServerFailed, match="gave no completion: KeyError"):
            one.draw([5], SAMPLING, 1, 0, (), FRESH, False, 5.0)
