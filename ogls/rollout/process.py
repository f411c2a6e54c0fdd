"""An engine runs in a process of its own, where it samples beside the training.

If it crashes, the trainer lives on.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ogls.records import Completion, Sampling
from ogls.rollout.engine import RolloutEngine
from ogls.system.memory.serving import Serving
from ogls.system.memory.shapes import Shapes

if TYPE_CHECKING:
    from ogls.policy.lora import Lora
    from ogls.policy.policy import Policy

_FILE = "weights.safetensors"
_BEAT = 1.0  # seconds between two signs of life that are passed on
_PATIENCE = 5.0  # seconds in which the process may close by itself
_OF_A_GROUP = re.compile(
    r"((LOCAL_|GROUP_|ROLE_|NODE_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*)"
)
"""Variables by which torchrun and Lightning tell a process its place among others."""


class EngineProcess(RolloutEngine):
    """An engine process runs `engine` in a process that ends when this one does, and hands it weights as files.

    A call waits without Python's lock, so that another thread can train meanwhile. The process has this one's GPU, and
    is part of no group of processes: of several training processes, each may have an engine beside it.

    Raises:
        ValueError: the engine samples with the policy itself, which is in this process.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        if not engine.copies_policy:
            raise ValueError(
                f"{type(engine).__name__} samples with the policy itself and cannot run beside its training: set "
                "data.engine to ogls.rollout.vllm.VllmEngine, or data.one_step_off to false"
            )
        self.engine = engine
        self.samples_policy = engine.samples_policy
        self._process: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] | None = None

    def check_device(self, kind: str) -> None:
        self.engine.check_device(kind)

    def serving(self, shapes: Shapes) -> Serving | None:
        self.engine.adapter_rank = self.adapter_rank
        serving = self.engine.serving(shapes)
        return serving and replace(serving, own_process=True)

    @property
    def asked_cache(self) -> int | None:
        return self.engine.asked_cache

    def _start(self, folder: Path, context_length: int) -> None:
        self.engine.adapter_rank, self.engine.cache_bytes = self.adapter_rank, self.cache_bytes
        self.engine.thought_ids = self.thought_ids
        if self._environment is None:  # a thread that starts it again may have another current GPU
            gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
            self._environment = environment_of_one(os.environ, gpu)
        ours, theirs = socket.socketpair()
        with theirs:
            # The process has a session of its own, so that Ctrl-C reaches the trainer alone. Nothing is ever written to
            # its standard input, which the system closes when the trainer is gone.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ogls.rollout.process", str(theirs.fileno())],
                stdin=subprocess.PIPE,
                env=self._environment | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._connection.send(self.engine)
        self._call("start", folder, context_length)

    def _load(self, policy: Policy) -> None:
        self._call("load", policy.folder, policy.lora, policy=policy)

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        return self._call("generate", [tuple(prompt) for prompt in prompts], sampling, n, seed)

    def _close(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            self._connection.close()  # it ends of itself when it next looks
            for end in (process.terminate, process.kill):
                try:
                    process.wait(_PATIENCE)
                    break
                except subprocess.TimeoutExpired:
                    end()
            process.communicate()

    def _call(self, method: str, *arguments: Any, policy: Policy | None = None) -> Any:
        """Returns the other side's answer, or raises its error. Meanwhile the other side may ask for weights."""
        connection = self._connection
        try:
            connection.send((method, arguments))
            while True:
                kind, value = connection.recv()
                if kind == "save_merged" and policy is not None:
                    save_file({name: w.contiguous() for name, w in policy.merged_weights()}, Path(value) / _FILE)
                elif kind == "save_adapter" and policy is not None:
                    policy.save_adapter(value)
                elif kind == "beat":
                    self.beat()
                    continue
                elif kind == "error":
                    raise value
                else:
                    return value
                connection.send(None)
        except (EOFError, ConnectionError) as error:
            raise RuntimeError("the engine's process has ended") from error


def environment_of_one(environment: Mapping[str, str], gpu: int | None) -> dict[str, str]:
    """Returns `environment` for a process that is alone: without what a launcher says of a group, and with one GPU.

    Args:
        environment: variables of a process that may be one of several
        gpu: number of its GPU among those that it sees; None without one
    """
    own = {name: value for name, value in environment.items() if not _OF_A_GROUP.fullmatch(name)}
    if gpu is not None:
        seen = environment.get("CUDA_VISIBLE_DEVICES")
        own["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu].strip() if seen else str(gpu)
    return own


class _SavedPolicy:
    """A saved policy gives an engine weights from files, which the trainer writes when they are asked for."""

    def __init__(self, connection: Connection, folder: Path, lora: Lora | None) -> None:
        self._connection, self.folder, self.lora = connection, folder, lora
        self.adapter_rank = lora.rank if lora else 0

    def merged_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        with TemporaryDirectory(prefix="ogls-weights-") as folder:
            self._ask("save_merged", folder)
            with safe_open(Path(folder) / _FILE, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    yield name, tensors.get_tensor(name)

    def save_adapter(self, folder: Path) -> None:
        self._ask("save_adapter", folder)

    def _ask(self, kind: str, folder: Path | str) -> None:
        self._connection.send((kind, folder))
        self._connection.recv()


def _serve(engine: RolloutEngine, connection: Connection) -> None:
    last = 0.0

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= _BEAT:
            last = time.monotonic()
            connection.send(("beat", None))

    engine.beat = beat
    while True:
        method, arguments = connection.recv()
        try:
            if method == "load":
                policy: Any = _SavedPolicy(connection, *arguments)
                answer = ("done", engine.load(policy, 0))  # the trainer's side knows the version
            else:
                answer = ("done", getattr(engine, method)(*arguments))
        except ValueError as error:
            answer = ("error", ValueError(str(error)))
        except Exception as error:
            answer = ("error", RuntimeError(f"{type(error).__name__}: {error}"))
        connection.send(answer)


def _end_with_trainer() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)


def main() -> None:
    """Runs an engine for the trainer at the other end of the socket whose number is the first argument."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    threading.Thread(target=_end_with_trainer, name="ogls-trainer", daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    engine: RolloutEngine = connection.recv()
    try:
        _serve(engine, connection)
    except (EOFError, ConnectionError):
        pass  # the trainer is gone
    finally:
        engine.close()


if __name__ == "__main__":
    main()
