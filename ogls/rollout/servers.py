"""Any number of vLLM servers, on this machine or others, sample rollouts as one engine."""

from __future__ import annotations

import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from ogls.records import Completion, Sampling
from ogls.rollout.engine import RolloutEngine, prompt_seeds
from ogls.rollout.server import Server, ServerFailed, served_name
from ogls.rollout.transfer import Transfer
from ogls.rollout.weight_files import new_folder, settle, write_weights
from ogls.system.exits import EngineFailed
from ogls.system.ranges import POSITIVE, within
from ogls.system.watchdog import TimeExpired

if TYPE_CHECKING:
    from torch import Tensor

    from ogls.policy.policy import Policy

_SEQUENCES, _REQUESTS = 512, 128  # that a server has under way or waiting: the rest goes to whoever is first


class VllmServers(RolloutEngine):
    """This engine samples with vLLM servers, which run beside the training on GPUs that do not train.

    A prompt goes to the server that has least to do, with a seed of its own, so that it does not matter which. The
    prompts of a server that dies or is silent go to the others; it is left out until the next load, when it is given
    the present weights like all others. An order to take weights is never given twice. ``experiments/serve.py`` starts
    a server from the same configuration.

    Args:
        urls: addresses of the servers, such as http://127.0.0.1:8001
        sync: weights that servers are given, and how: ``adapter`` for the adapter alone, as files; ``files`` for all
            that can have changed, as files; ``transfer`` for the same by vLLM's weight transfer, which is NCCL between
            GPUs; ``auto`` for ``adapter`` if the policy has one, otherwise ``files``
        folder: folder for these files, which trainer and servers see under one name
        answer_within: seconds in which a server has to complete a prompt; after them it is left out
        start_within: seconds that are waited for servers: for all of them at the beginning, for the first of them after
            all have failed
    """

    remote = True

    def __init__(
        self,
        urls: list[str],
        sync: Literal["auto", "adapter", "files", "transfer"] = "auto",
        folder: str = "/dev/shm",
        answer_within: float = 600.0,
        start_within: float = 600.0,
    ) -> None:
        self.servers = [Server(url) for url in urls]
        if not urls or len({server.url for server in self.servers}) < len(urls):
            raise ValueError(f"data.engine.urls: expected one address per server, got {urls}")
        within("data.engine.answer_within", answer_within, POSITIVE)
        within("data.engine.start_within", start_within, POSITIVE)
        self.sync, self.folder = sync, folder
        self.answer_within, self.start_within = answer_within, start_within
        self.alive: list[Server] = []
        self._met = False  # all servers have answered once
        self._run, self._loads, self._mark = uuid.uuid4().hex[:8], 0, ""
        self._adapter = False  # whether the weights that servers have are an adapter
        self._kept: TemporaryDirectory[str] | None = None  # adapter that servers may read again
        self._transfer: Transfer | None = None

    @property
    def metrics(self) -> dict[str, float]:
        return {"train/servers": float(len(self.alive))}

    # ---- servers come and go ----

    def _start(self, folder: Path, context_length: int) -> None:
        if not Path(self.folder).is_dir():
            raise ValueError(f"data.engine.folder: there is no folder {self.folder!r}")
        self._name, self._length = served_name(folder), context_length
        deadline, told = time.monotonic() + self.start_within, False
        while True:
            up = self._well()
            if len(up) >= (1 if self._met else len(self.servers)):
                break
            missing = " ".join(server.url for server in self.servers if server not in up)
            if time.monotonic() > deadline:
                raise EngineFailed(
                    f"no answer from {missing} within {self.start_within:g} s: is it started (experiments/serve.py), "
                    "and may this machine reach it?"
                )
            if not told:
                print(f"Waiting up to {self.start_within:g} s for {missing}", file=sys.stderr, flush=True)
            told = True
            self.beat()
            time.sleep(min(1.0, self.start_within / 10))
        self.alive = []
        for server in up:
            if self._met:
                self._admit(server)
                continue
            try:
                server.check(self._name, self._length)
            except ServerFailed as error:
                raise EngineFailed(str(error)) from error
            self.alive.append(server)
        self._met = True

    def _well(self) -> list[Server]:
        with ThreadPoolExecutor(len(self.servers)) as threads:
            well = list(threads.map(Server.well, self.servers))
        return [server for server, is_well in zip(self.servers, well, strict=True) if is_well]

    def _admit(self, server: Server) -> None:
        try:
            server.check(self._name, self._length)
            self.alive.append(server)
        except (ServerFailed, ValueError) as error:
            self._leave_out(server, error)

    def _leave_out(self, server: Server, error: Exception) -> None:
        """Has a server do nothing until the next load; its other calls fail at once."""
        if server in self.alive:
            self.alive.remove(server)
        server.hang_up()
        print(f"{server} is left out until the next weights: {error}", file=sys.stderr, flush=True)

    def each(self, check: Callable[[str, RolloutEngine], None]) -> None:
        for server in list(self.alive):
            alone = copy(self)
            alone.servers, alone.alive = [server], [server]
            try:
                check(server.url, alone)
            except TimeExpired:
                raise
            except RuntimeError as error:
                if alone.alive:
                    self._leave_out(server, error)
                else:  # said already
                    self.alive.remove(server)
                if not self.alive:
                    raise

    # ---- weights ----

    def _load(self, policy: Policy) -> None:
        self._adapter, previous = self._takes_adapter(policy.adapter_rank), self._kept
        up = self._well()
        for server in self.servers:
            if server in self.alive and server not in up:
                self._leave_out(server, ServerFailed("it does not answer /health"))
            elif server in up and server not in self.alive:
                self._admit(server)
        if not self.alive:
            raise ServerFailed(f"none of {self.servers} answers")
        self._loads += 1
        self._mark = f"{self._run}-{self._loads}"
        if self.sync == "transfer":
            self._send(policy)
            return
        self._kept = new_folder(Path(self.folder))
        folder = Path(self._kept.name)
        if self._adapter:
            policy.save_adapter(folder)
            settle(folder)
            self._give(lambda server: self._give_adapter(server, folder))
        else:
            write_weights(self._beating(policy.merged_weights()), folder)
            order = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._give(lambda server: server.call("POST", "/collective_rpc", order))
            self._kept.cleanup()
        if previous is not None:
            previous.cleanup()

    def _beating(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for weight in weights:
            self.beat()
            yield weight

    def _takes_adapter(self, rank: int) -> bool:
        if self.sync == "adapter" and not rank:
            raise ValueError('this policy has no adapter: set data.engine.sync to "files", "transfer" or "auto"')
        return self.sync == "adapter" or (self.sync == "auto" and bool(rank))

    def _give_adapter(self, server: Server, folder: Path) -> None:
        """Gives the adapter a name that it never had: under an old one vLLM goes on with old keys and values."""
        known = [model["id"] for model in server.call("GET", "/v1/models")["data"][1:]]
        server.call("POST", "/v1/load_lora_adapter", {"lora_name": self._mark, "lora_path": str(folder)})
        for name in known:
            server.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def _give(self, order: Callable[[Server], object]) -> None:
        def take(server: Server) -> None:
            server.pause()
            order(server)
            server.resume(self._mark)

        self._everywhere(take)

    def _send(self, policy: Policy) -> None:
        """Sends the weights to all servers at once, of which one that fails breaks the transfer for all."""
        self._everywhere(Server.pause)
        if self._transfer is None:
            self._transfer = Transfer(Path(self.folder))
        self._transfer.send(self.alive, policy)
        self._everywhere(lambda server: server.resume(self._mark))

    def _everywhere(self, step: Callable[[Server], None]) -> None:
        """Takes a step with every server at the same time; who fails is left out, and it is an error if all do."""
        takers = list(self.alive)
        with ThreadPoolExecutor(len(takers)) as threads:
            taken = [threads.submit(step, server) for server in takers]
            while wait(taken, timeout=1.0).not_done:
                self.beat()  # each call has a limit of its own
        for server, error in [(server, done.exception()) for server, done in zip(takers, taken, strict=True)]:
            if isinstance(error, ServerFailed):
                self._leave_out(server, error)
            elif error is not None:
                raise error
        if not self.alive:
            raise ServerFailed(f"none of {self.servers} took the weights")

    # ---- tokens ----

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        seeds, waiting = prompt_seeds(prompts, seed), deque(range(len(prompts)))
        done: dict[int, list[Completion]] = {}
        busy: dict[Future[list[Completion]], tuple[int, Server]] = {}
        room = max(1, min(_REQUESTS, _SEQUENCES // n))
        with ThreadPoolExecutor(room * max(1, len(self.alive))) as threads:
            try:
                while len(done) < len(prompts):
                    while waiting and (server := self._free(busy, room)) is not None:
                        i = waiting.popleft()
                        asked = (prompts[i], sampling, n, seeds[i], self._end_token_ids, self._mark)
                        busy[threads.submit(server.draw, *asked, self._adapter, self.answer_within)] = (i, server)
                    if not busy:
                        raise ServerFailed(f"none of {self.servers} answers")
                    for answer in wait(busy, timeout=1.0, return_when=FIRST_COMPLETED).done:
                        i, server = busy.pop(answer)
                        try:
                            done[i] = answer.result()
                        except ServerFailed as error:
                            waiting.appendleft(i)
                            if server in self.alive:
                                self._leave_out(server, error)
                    self.beat()  # a server that is silent is noticed by `answer_within`
            finally:
                for _, server in busy.values():
                    server.hang_up()
        return [done[i] for i in range(len(prompts))]

    def _free(self, busy: dict[Future[list[Completion]], tuple[int, Server]], room: int) -> Server | None:
        """Returns the server with least to do, if it has room."""
        load = dict.fromkeys(self.alive, 0)
        for _, server in busy.values():
            if server in load:
                load[server] += 1
        least = min(load, key=lambda server: load[server], default=None)
        return least if least is not None and load[least] < room else None

    def _close(self) -> None:
        for server in self.servers:
            server.hang_up()
        self.alive = []
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
        if self._kept is not None:
            self._kept.cleanup()
            self._kept = None
