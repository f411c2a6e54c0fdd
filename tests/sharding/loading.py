"""What a process holds in memory of its own while a model is read, beside other processes or alone."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ogls.policy.policy import Policy
from ogls.policy.sharding import give_memory_back
from ogls.policy.teacher import Frozen
from tests.sharding.ranks import launched, nbytes


class Reading(Policy):
    """Makes no pass after the weights are read: what a pass takes is another figure."""

    def _refuse_non_linear_head(self) -> None:
        pass


def anonymous() -> int:
    """Bytes of this process that are no mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def load(small: str, folder: str, rank: str, size: str, port: str, model: str) -> None:
    """Reads a model's weights, makes passes, reads a frozen teacher's, and tells the most memory that it took.

    A small model is read before: libraries take memory at their first use.
    """
    mesh = None
    if int(size) > 1:
        launched(int(rank), int(size), int(port))
        dist.init_process_group("gloo")
        give_memory_back()
        mesh = init_device_mesh("cpu", (int(size),))
    Policy(small, lora=None, dtype="float32").load(mesh)
    policy = Reading(model, lora=None, dtype="float32")
    assert policy.tokenizer
    before = most = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, anonymous())
            time.sleep(0.002)

    watching = threading.Thread(target=watch)
    watching.start()
    policy.load(mesh)
    read = most
    with torch.no_grad():
        for _ in range(3):
            policy.hidden([[1, 2, 3]], [[4, 5, 6]], [0])
    policy.let_go()
    passed, left, most = most, anonymous(), anonymous()
    kept = Frozen().start(policy)
    done.set()
    watching.join()
    told = {
        "most": read - before,
        "in passes": passed - before,
        "after passes": left - before,
        "weights": nbytes(policy.parameters()),
        "teacher": nbytes(kept.values()),
    }
    (Path(folder) / f"loaded-{rank}.json").write_text(json.dumps(told))
    if mesh is not None:
        dist.destroy_process_group()
