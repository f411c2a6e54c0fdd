"""An arena forks runs of the command line, kills them, has them go on, and compares them with an unbroken run."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ogls.callbacks.best import ADAPTER
from ogls.tracking.files import TRACE, read_trace
from tests.faults.nursery import Nursery
from tests.faults.reaper import EVENTS
from tests.faults.test_resume import ENVIRONMENT, LAST, fit, run_in, told

CLOCK = "clock"
COUNTED = ("mlflow", ADAPTER, "/runs/")  # kinds that a reaper counts
PLAIN = ("--data.engine", "tests.scripted.PeakingEngine")
AHEAD = (
    *("--data.engine", "tests.scripted.ChainEngine", "--data.one_step_off", "true"),
    *("--method.objective.importance_cap", "2"),
)
TWO = (*PLAIN, "--trainer.strategy", "ddp", "--trainer.devices", "2")
_TOLD = ("train/", "val/", "val_subset/", "final/")


def progress(process: int) -> tuple[bool, float]:
    """Whether a process has ended, and its seconds of processor time, which a busy machine does not change."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0] == "Z", (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Campaign:
    """Kills of one kind: `kind` is what a reaper counts, or the clock; `arguments` say what runs.

    `share` is the part of all events before which a reaper strikes; a small one leaves runs to be struck again.
    """

    kind: str = CLOCK
    arguments: tuple[str, ...] = PLAIN
    ranks: int = 1
    share: float = 0.3


@dataclass
class Unbroken:
    """What a run is that nothing disturbs, and how much there was to disturb."""

    folder: Path
    begun: float = 0.0  # seconds of processor time before its first checkpoint
    ended: float = 0.0
    events: dict[str, int] = field(default_factory=dict)


class Arena:
    """A place to fork runs, to kill them, and to compare what is left with the unbroken one."""

    def __init__(self, nursery: Nursery, model: Path, database: Path, place: Path) -> None:
        self.nursery, self.model, self.database, self.place = nursery, model, database, place
        self._unbroken: dict[tuple[str, ...], Unbroken] = {}

    def folder(self, name: str) -> Path:
        folder = self.place / name
        if not folder.exists():
            folder.mkdir(parents=True)
            shutil.copy(self.database, folder / "mlflow.db")
        return folder

    def start(self, campaign: Campaign, folder: Path, at: int | None = None, kinds: str = "") -> list[int]:
        """Process ids, one per rank; the run goes on where there is something to go on with.

        A reaper strikes at the event number `at` of the campaign's kind; with 0 it counts those of all `kinds`.
        """
        goes_on = (folder / "runs").exists() and any((folder / "runs").iterdir())
        arguments = fit(
            self.model,
            *("--data.verifier", "tests.faults.boxed.Boxed"),
            *("--trainer.logger.init_args.tracking_uri", "sqlite:///mlflow.db"),
            *campaign.arguments,
            *(("--ckpt_path", "last") if goes_on else ()),
        )
        armed = ("run",) if at is None else ("run_armed", kinds or campaign.kind, at)
        port, forked = _free_port(), []
        for rank in range(campaign.ranks):
            environment = json.dumps(
                ENVIRONMENT | (_launched(rank, campaign.ranks, port) if campaign.ranks > 1 else {})
            )
            output = folder / f"output-{rank}.txt"
            forked.append(self.nursery.fork(*armed, folder, output, environment, *arguments))
        return forked

    def unbroken(self, campaign: Campaign) -> Unbroken:
        """Made once per setting, with all events counted where one process makes it."""
        made = self._unbroken.get(campaign.arguments)
        if made is None:
            made = self._unbroken[campaign.arguments] = Unbroken(self.folder(f"unbroken-{len(self._unbroken)}"))
            counted = campaign.arguments is PLAIN
            processes = self.start(campaign, made.folder, 0 if counted else None, " ".join(COUNTED))
            while not progress(processes[0])[0]:
                time.sleep(0.01)
                if not made.begun and any(made.folder.glob("runs/*/checkpoints/*.ckpt")):
                    made.begun = progress(processes[0])[1]
            made.ended = progress(processes[0])[1]
            assert [self.nursery.wait(process) for process in processes] == [0] * campaign.ranks, said(made.folder)
            same(made.folder, made.folder)
            if counted:  # the second of three is the best: an adapter that was not written in time stays unwritten
                best = torch.load(run_in(made.folder) / "checkpoints/best.ckpt", weights_only=True)
                assert best["global_step"] == 2 * LAST // 3
                files = {kind: made.folder / EVENTS.format(kind.strip("/")) for kind in COUNTED}
                made.events = {kind: int(file.read_text()) for kind, file in files.items()}
        return made

    def strike(self, campaign: Campaign, folder: Path, rng: random.Random) -> bool:
        """Whether the run in `folder`, gone on with, was killed; else it came to its end before that."""
        unbroken = self.unbroken(campaign)
        if campaign.kind != CLOCK:
            last = round(campaign.share * unbroken.events[campaign.kind])
            processes = self.start(campaign, folder, at=rng.randint(1, last))
        else:
            processes = self.start(campaign, folder)
            moment = rng.uniform(0.8 * unbroken.begun, unbroken.ended)
            while progress(processes[0]) < (False, moment):
                time.sleep(0.005)
            first = rng.randrange(campaign.ranks)
            for process in processes[first : first + 1 + rng.randrange(campaign.ranks)]:
                os.kill(process, 9)
        codes = [self.nursery.wait(process) for process in processes]
        assert -9 in codes or codes == [0] * campaign.ranks, (codes, said(folder))
        return codes != [0] * campaign.ranks

    def survive(self, name: str, campaign: Campaign, kills: int) -> int:
        """Kill so often; what comes to its end is compared with the unbroken run. Returns how many runs did."""
        rng, killed, done = random.Random(kills), 0, 0
        unbroken = self.unbroken(campaign).folder
        while killed < kills:
            folder = self.folder(f"{name}-{done}")
            if self.strike(campaign, folder, rng):
                killed += 1
                print(f"{killed} of {kills}: {name}", flush=True)
            else:
                same(folder, unbroken)
                done += 1
        folder = self.folder(f"{name}-{done}")
        processes = self.start(campaign, folder)
        assert [self.nursery.wait(process) for process in processes] == [0] * campaign.ranks, said(folder)
        same(folder, unbroken)
        return done + 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _launched(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives."""
    told = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0}
    told |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {name: str(value) for name, value in told.items()}


def said(folder: Path) -> str:
    return "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("output-*.txt")))


def in_mlflow(folder: Path) -> dict[str, Any]:
    """All that MLflow has of the only run but for what a clock says: metrics, parameters, artifacts, status."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        ((run, status),) = database.execute("select run_uuid, status from runs").fetchall()
        metrics = database.execute("select key, step, value from metrics").fetchall()
        params = dict(database.execute("select key, value from params").fetchall())
        ((tables,),) = database.execute("select value from tags where key = 'mlflow.loggedArtifacts'").fetchall()
    (artifacts,) = (folder / "mlartifacts").glob(f"*{run}/artifacts")
    files = {str(file.relative_to(artifacts)): file.read_bytes() for file in artifacts.rglob("*") if file.is_file()}
    return {
        "status": status,
        "metrics": sorted(metric for metric in metrics if metric[0].startswith(_TOLD)),
        "params": params,
        "tables": tables,
        "files": files,
    }


def same(folder: Path, unbroken: Path) -> None:
    ended, expected = run_in(folder), run_in(unbroken)
    assert told(folder) == told(unbroken)
    steps = [phase.step for phase in read_trace(ended / TRACE) if phase.name == "optimizer"]
    assert steps == list(range(1, LAST + 1))
    for name in ("last.ckpt", "best.ckpt"):
        got, wanted = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (ended, expected))
        assert got["global_step"] == wanted["global_step"], name
        assert all(torch.equal(got["state_dict"][key], value) for key, value in wanted["state_dict"].items()), name
    got, wanted = (load_file(run / ADAPTER / "adapter_model.safetensors") for run in (ended, expected))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], value) for key, value in wanted.items()), ADAPTER
    known, wanted = in_mlflow(folder), in_mlflow(unbroken)
    assert known["status"] == "FINISHED"
    assert [tuple(metric) for metric in known["metrics"]] == told(folder)
    for name, value in wanted.items():
        assert known[name] == value, name
