"""vLLM's own weight transfer hands weights to several servers at once.

Between GPUs it is NCCL, elsewhere a file.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ogls.rollout.server import ORDER, Server, ServerFailed

if TYPE_CHECKING:
    from ogls.policy.policy import Policy


class Transfer:
    """A transfer is the trainer's end of vLLM's weight transfer, for as long as the same servers take part.

    Args:
        folder: folder for the file that takes the place of NCCL where there is no GPU
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: list[Server] = []
        self._source = _Source()
        self._engine: Any = None

    def send(self, servers: Sequence[Server], policy: Policy) -> None:
        """Sends the policy's weights to paused servers.

        Raises:
            ServerFailed: this broke off; whoever took part may have parts of the weights, and is not asked again.
        """
        try:
            _within(ORDER, lambda: self._send(servers, policy))
        except Exception:
            self._engine = None  # NCCL may wait for ever for who is gone: nothing of it is used again
            raise

    def _send(self, servers: Sequence[Server], policy: Policy) -> None:
        self._source.policy = policy
        if self._engine is None or list(servers) != self._servers:
            self.close()
            self._engine, self._servers = self._begin(servers), list(servers)
        self._engine.send_weights()

    def _begin(self, servers: Sequence[Server]) -> Any:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        import ogls.rollout.file_transfer as by_file

        sizes = [server.call("GET", "/get_world_size")["world_size"] for server in servers]
        if torch.cuda.is_available():
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            address = _address(servers)
            info: Any = NCCLTrainerInitInfo(address, _free_port(address), 1 + sum(sizes), rank=0)
        else:
            info = by_file.TrainerInit(folder=str(self._folder), rank=0)
        client: Any = _Servers(servers, sizes)
        source: Any = self._source
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)

    def close(self) -> None:
        """Ends the transfer with those servers that still answer."""
        if self._engine is not None:
            self._engine.shutdown()
            for server in self._servers:
                with suppress(ServerFailed):
                    server.call("POST", "/shutdown_weight_transfer_engine")
        self._engine = None


class _Source:
    """A source gives the policy's weights, with the methods of vLLM's ``WeightSource``."""

    policy: Policy

    def __init__(self) -> None:
        self._known: list[Any] = []

    def metadata(self) -> list[Any]:
        """Returns names, dtypes and shapes; the first call reads all weights for it."""
        from vllm.distributed.weight_transfer import ParamMeta

        if not self._known:
            self._known = [ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in self]
        return self._known

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.policy.merged_weights()


class _Servers:
    """Several servers are spoken to as one, with the methods of vLLM's ``VLLMWeightSyncClient``.

    Args:
        servers: servers that take part
        sizes: number of vLLM's workers behind each
    """

    def __init__(self, servers: Sequence[Server], sizes: Sequence[int]) -> None:
        self._servers, self._sizes = servers, sizes

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = []
        for before in range(len(self._servers)):
            info = dict(init_info)
            if "rank_offset" in info:  # all workers are one group, and each server's follow those before it
                info["rank_offset"] += sum(self._sizes[:before])
            infos.append({"init_info": info})
        self._post("/init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", [None] * len(self._servers))

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", [{"update_info": update_info}] * len(self._servers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", [None] * len(self._servers))

    def _post(self, path: str, bodies: Sequence[Any]) -> None:
        with ThreadPoolExecutor(len(bodies)) as threads:
            calls = [
                threads.submit(server.call, "POST", path, body)
                for server, body in zip(self._servers, bodies, strict=True)
            ]
        for call in calls:
            call.result()


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Waits for a call in a thread of its own, which is left behind if it hangs in NCCL."""
    failed: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="ogls-transfer", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise ServerFailed(f"the weight transfer did not end within {seconds:g} s")
    if failed:
        raise failed[0]


def _address(servers: Sequence[Server]) -> str:
    """Returns the address of this machine that the servers reach it by."""
    hosts = [socket.gethostbyname(server.host) for server in servers]
    far = next((host for host in hosts if not ipaddress.ip_address(host).is_loopback), hosts[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((far, 9))  # sends nothing
        return probe.getsockname()[0]


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
