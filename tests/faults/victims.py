"""What is killed: functions run in a process forked from one that has imported everything (see `nursery`)."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from safetensors.torch import save_file

from ogls.callbacks.best import CHECKPOINTS, LAST
from ogls.callbacks.checkpoint_io import write
from ogls.lessons.advantage import GroupRelative
from ogls.loss.objective import Distillation, Mixture
from ogls.loss.policy_gradient import GRPO
from ogls.methods import OnPolicyDistillation
from ogls.policy.teacher import OtherModel
from ogls.rollout.vllm import VllmEngine
from ogls.sharded import Sharded
from ogls.system.exits import FolderInUse
from ogls.system.run_lock import lock_folder
from ogls.tracking import Tracker, tracker
from ogls.tracking.mlflow_run import MLflowRun
from tests import tiny
from tests.faults import reaper, small
from tests.scripted import Apart, ChainEngine


def train(model: str, folder: str, killed_at: str = "") -> None:
    """Train, or go on where it stopped; at the end the weights lie in `folder`."""
    tracker._PATIENCE_SERVER = 0.1  # there is no server to wait for
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    last = Path(folder) / "small-s0-run" / CHECKPOINTS / LAST
    killers = [KilledAt(int(killed_at))] if killed_at else []
    student = small.fit(Path(model), Path(folder), goes_on=last.exists(), callbacks=killers)
    save_file(small.weights(student), Path(folder) / "weights.safetensors")


def train_as(model: str, folder: str, rank: str, size: str, port: str, killed_at: str = "", by: str = "9") -> None:
    """Train as one of several processes, as if a launcher had begun them; `by` is the number of a signal."""
    os.chdir(folder)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    student = small.fit(
        Path(model),
        Path(folder),
        callbacks=[KilledAt(int(killed_at), int(by))] if killed_at else [],
        engine=ChainEngine(),
        training={"strategy": "ddp", "devices": int(size)} if size != "1" else {},
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        problems_per_step=5,
        epochs=2,
        advantage=GroupRelative(),
        objective=Mixture([GRPO(), Distillation()], [0.5, 1.0]),
        tokens_per_micro_batch=150,
        learning_rate=1e-4,
    )
    save_file(small.weights(student), Path(folder) / f"weights-{rank}.safetensors")


def sample_as(
    model: str, teacher: str, folder: str, engine: str, rank: str, size: str, port: str, strategy: str = "ddp"
) -> None:
    """Two steps as one of several processes, taught by another model, with an engine that wants its own process."""
    os.chdir(folder)
    if size != "1":
        os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "GROUP_RANK": "0",
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
        }
    vllm = VllmEngine(memory_gib=0.25, max_num_seqs=32, dtype="float32")
    student = small.fit(
        Path(model),
        Path(folder),
        method=OnPolicyDistillation(teacher=OtherModel(teacher)),
        engine=vllm if engine == "vllm" else Apart(folder),
        training={"strategy": Sharded() if strategy == "sharded" else strategy, "devices": int(size)}
        if size != "1"
        else {},
        steps_per_epoch=2,
        epochs=1,
        tokens_per_micro_batch=150,
        learning_rate=1e-4,
    )
    save_file(small.weights(student), Path(folder) / f"weights-{rank}.safetensors")


def run(folder: str, output: str, environment: str, *arguments: str) -> None:
    """experiments/run.py in `folder`, what it says in the file `output`."""
    os.chdir(folder)
    os.environ |= json.loads(environment)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    program = str(Path(__file__).parents[2] / "experiments" / "run.py")
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
    sys.exit(0)


def run_armed(kinds: str, at: str, folder: str, output: str, environment: str, *arguments: str) -> None:
    """`run`, killed at an event of one of the kinds (see `reaper`)."""
    os.chdir(folder)
    for kind in kinds.split():
        reaper.arm(kind, int(at))
    run(folder, output, environment, *arguments)


def train_until_told(folder: str) -> None:
    """A run that in its second step waits to be told to go on."""

    def wait() -> None:
        Path("stepping").touch()
        while not Path("told").exists():
            time.sleep(0.01)

    os.chdir(folder)
    tiny.trainer(2, system_metrics=False).fit(tiny.Tiny(during={2: wait}), tiny.TinyData())


def begin_database(uri: str, name: str) -> None:
    """A run of one metric in a database that may not be there yet."""
    made = MLflowRun(uri, "ogls", name, {}, system_metrics=False)
    made.params({"a": 1})
    made.metrics({"b": 2.0}, 0, 0.0)
    made.end("FINISHED", 0.0)


def track(uri: str, folder: str) -> None:
    """200 steps for a tracking server that may be away; the costliest share of a step goes to `cost`."""
    tracker._PATIENCE_SERVER = 1.0
    made = Tracker(tracking_uri=uri, folder=folder, run_name="r", system_metrics=False)
    start = time.perf_counter()
    for step in range(200):
        made.log_metrics({"train/loss": 1.0}, step)
    (Path(folder) / "cost").write_text(str((time.perf_counter() - start) / 200))
    made.finalize("success")
    sys.exit(0)


class KilledAt(Checkpoint):
    """Killed when the checkpoint of a step has been written. Lightning calls callbacks of this kind last, in order."""

    monitor = None

    def __init__(self, step: int, by: int = signal.SIGKILL) -> None:
        self.step, self.by = step, by

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.by)


class KilledIn(Callback):
    """Kills the run in one of its last hooks."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def on_train_end(self, *_: Any) -> None:
        self._end("on_train_end")

    def on_fit_end(self, *_: Any) -> None:
        self._end("on_fit_end")

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._end("teardown")

    def _end(self, moment: str) -> None:
        if moment == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)


def save_for_ever(path: str) -> None:
    """Checkpoint after checkpoint, of growing number, under one name."""
    step = 0
    while True:
        step += 1
        tensors = {str(i): torch.full((50_000,), float(step)) for i in range(10)}
        write({"global_step": step, "state_dict": tensors}, Path(path))


def race(folder: str, go: str) -> None:
    """Take the folder at the moment `go`; exit code 0, or 73 where the other has it, who keeps it until then."""
    lost = Path(folder) / "lost"
    while time.time() < float(go):
        pass
    try:
        _held = lock_folder(Path(folder))
    except FolderInUse:
        lost.touch()
        os._exit(FolderInUse.exit_code)
    while not lost.exists():
        time.sleep(0.01)


def hold(folder: str) -> None:
    """Take the folder and keep it."""
    _held = lock_folder(Path(folder))
    time.sleep(600)


def load_sharded(*arguments: str) -> None:
    """See `tests.sharding.loading`."""
    from tests.sharding.loading import load

    load(*arguments)


def train_sharded(*arguments: str) -> None:
    """See `tests.sharding.ranks`."""
    from tests.sharding.ranks import train

    train(*arguments)
