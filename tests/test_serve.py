"""A server is started as the configuration says, and again when it dies; only a private network reaches it."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ogls import serve
from ogls.rollout.server import served_name
from ogls.serve import Command, command, main, private, supervise
from ogls.system.exits import EngineFailed
from tests.test_cli import small


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sys.argv", ["serve.py"])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def settings(model: Path, *further: str) -> list[str]:
    without = [word for word in small(model) if word not in ("--data.engine", "TransformersEngine")]
    return [*without, *further]


def flags(made: Command) -> dict[str, str]:
    """Each flag with its value, or with nothing."""
    words, found = list(made.arguments[3:]), {}
    while words:
        flag = words.pop(0)
        found[flag] = words.pop(0) if words and not words[0].startswith("--") else ""
    return found


def test_the_command_follows_from_the_configuration(tiny_model: Path) -> None:
    engine = ("--data.engine.dtype", "float32", "--data.engine.memory_gib", "0.5", "--data.engine.max_num_seqs", "32")
    made = command(settings(tiny_model, *engine), "127.0.0.1", 8001)
    assert made.arguments[:3] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    wanted = {
        "--host": "127.0.0.1",
        "--port": "8001",
        "--model": str(tiny_model),
        "--served-model-name": served_name(tiny_model),
        "--max-model-len": "256",
        "--max-num-seqs": "32",
        "--dtype": "float32",
        "--kv-cache-memory-bytes": str(2**29),
        "--enable-lora": "",
        "--enable-scale-out": "",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--skip-tokenizer-init": "",
        "--weight-transfer-config": '{"backend": "ogls_file"}',
    }
    assert {name: flags(made).get(name) for name in wanted} == wanted
    assert made.environment["VLLM_SERVER_DEV_MODE"] == made.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert made.url == "http://127.0.0.1:8001"


def test_a_gpu_is_the_servers_own(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = flags(command(settings(tiny_model), "127.0.0.1", 8001))
    assert "--kv-cache-memory-bytes" not in found, "vLLM takes what is left"
    assert found["--weight-transfer-config"] == '{"backend": "nccl"}'
    assert not {"--worker-extension-cls", "--enforce-eager"} & found.keys()


def test_without_an_adapter_and_with_servers_in_the_configuration(tiny_model: Path) -> None:
    servers = ("--data.engine", "VllmServers", "--data.engine.urls", "[http://127.0.0.1:8001]", "--policy.lora", "null")
    made = command(settings(tiny_model, *servers), "127.0.0.1", 8001, ["--max-num-seqs", "8"])
    assert "--enable-lora" not in flags(made)
    assert flags(made)["--dtype"] == "float32"  # as the policy
    assert made.arguments[-2:] == ("--max-num-seqs", "8")
    merged = command(settings(tiny_model, "--data.engine.sync", "merged"), "127.0.0.1", 8001)
    assert "--enable-lora" not in flags(merged)


def test_several_training_devices_are_no_matter_of_the_server(tiny_model: Path) -> None:
    many = ("--trainer.devices", "64", "--trainer.accelerator", "gpu")
    assert command(settings(tiny_model, *many), "127.0.0.1", 8001).name == served_name(tiny_model)


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.5", "localhost"])
def test_loopback_and_private_addresses_are_listened_on(host: str) -> None:
    assert private(host) == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1", "8.8.8.8", "224.0.0.1", "no such host"])
def test_other_addresses_are_refused(host: str) -> None:
    with pytest.raises(ValueError, match=r"^--host .* (is open to everybody; whoever|is no IPv4 address)"):
        private(host)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--host", "0.0.0.0", "--config", "math.yaml"], "--host '0.0.0.0' is open to everybody"),
        (["--config", "math.yaml", "--data.max_token", "3"], "max_token"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(given: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--port", "8001", *given])
    assert stopped.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert said in line


def test_a_port_in_use_is_refused_before_anything_starts(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as stopped:
            main(["--port", str(taken.getsockname()[1]), *settings(tiny_model)])
    assert stopped.value.code == 2
    assert "cannot be listened on: Address already in use" in capfd.readouterr().err


def test_the_plain_command_is_printed(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--port", "8001", *settings(tiny_model), "--print-command", "--", "--tensor-parallel-size", "2"])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[0] == "env"
    assert words[-2:] == ["--tensor-parallel-size", "2"]


LITTLE = """
import http.server, os, sys
class Well(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
open(sys.argv[2], "a").write(f"{os.getpid()} {os.environ['PLANTED']}\\n")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Well).serve_forever()
"""


def little(place: Path) -> tuple[Command, Path]:
    """Stands for vLLM, and writes down each of its starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    starts = place / "starts"
    starts.touch()
    arguments = (sys.executable, "-c", LITTLE, str(port), str(starts))
    return Command(arguments, {"PLANTED": "here"}, "ogls-0", f"http://127.0.0.1:{port}"), starts


@pytest.mark.fault("server dies")
def test_a_server_that_dies_is_started_again_until_the_supervisor_is_told_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_PAUSE", 0.05)
    made, starts = little(tmp_path)

    def visit() -> None:
        for number in range(4):  # more often than it may fail in a row before it is ready
            while len(starts.read_text().splitlines()) <= number or said.count("is ready") <= number:
                time.sleep(0.02)
            if number < 3:
                os.kill(int(starts.read_text().splitlines()[-1].split()[0]), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGTERM)

    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.extend("is ready" for w in words if "is ready" in w))
    watcher = threading.Thread(target=visit, daemon=True)
    watcher.start()
    supervise(made)
    watcher.join(5)
    rows = [line.split() for line in starts.read_text().splitlines()]
    assert len(rows) == 4
    assert {row[1] for row in rows} == {"here"}
    with pytest.raises(ProcessLookupError):
        os.kill(int(rows[-1][0]), 0)


def test_a_server_that_never_gets_ready_ends_the_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_PAUSE", 0.02)
    made = Command((sys.executable, "-c", "raise SystemExit(3)"), {}, "ogls-0", "http://127.0.0.1:9")
    with pytest.raises(EngineFailed, match="ended 3 times before it was ready"):
        supervise(made)
