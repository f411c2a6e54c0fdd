"""Campaigns of kills against the command line: whatever was killed when, the run that goes on is the unbroken one.

A killed run is gone on with at once, and may be killed again and again before it ends. `make torture` makes 200 kills.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from ogls.callbacks.best import ADAPTER
from ogls.tracking.files import CONFIG, DESCRIPTION
from tests.faults.arena import AHEAD, PLAIN, TWO, Arena, Campaign, said, same
from tests.faults.nursery import Nursery
from tests.faults.test_resume import LAST, run_in

CAMPAIGNS = {
    "kill -9 in the middle of a run": (Campaign(), 14, 60),
    "kill -9 during MLflow calls": (Campaign("mlflow"), 2, 40),
    "kill -9 during best-adapter writes": (Campaign(ADAPTER, share=1.0), 2, 30),
    "kill -9 at operations on files of the run": (Campaign("/runs/"), 2, 30),
    "kill -9 with one_step_off": (Campaign(arguments=AHEAD), 2, 20),
    "kill -9 of one or both of two processes": (Campaign(arguments=TWO, ranks=2), 2, 20),
}


@pytest.fixture(scope="module")
def arena(nursery: Nursery, tiny_model: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return Arena(nursery, tiny_model, empty_database, tmp_path_factory.mktemp("arena"))


@pytest.mark.parametrize(
    ("name", "campaign", "kills"),
    [
        pytest.param(name, campaign, kills, id=f"{kills} x {name}", marks=[pytest.mark.fault(name), *marks])
        for name, (campaign, few, many) in CAMPAIGNS.items()
        for kills, marks in (
            (few, [pytest.mark.timeout(900), *[pytest.mark.slow] * (campaign.arguments is not PLAIN)]),
            (many, [pytest.mark.torture, pytest.mark.timeout(7200)]),
        )
    ],
)
def test_a_killed_run_that_goes_on_is_the_unbroken_run(
    name: str, campaign: Campaign, kills: int, arena: Arena, record_property: Callable[[str, object], None]
) -> None:
    ends = arena.survive(f"{kills} {name}".replace(" ", "-"), campaign, kills)
    record_property("tried", kills)
    record_property("figure", f"{kills} kills, {ends} runs to their end: every figure and weight differs by 0")


def going_on_makes_it_whole(arena: Arena, campaign: Campaign, folder: Path) -> None:
    (process,) = arena.start(campaign, folder)
    assert arena.nursery.wait(process) == 0, said(folder)
    same(folder, arena.unbroken(campaign).folder)


@pytest.mark.fault("kill -9 during best-adapter writes")
def test_an_adapter_that_was_not_yet_written_is_that_of_the_best_checkpoint(arena: Arena) -> None:
    folder, events = arena.folder("no adapter"), arena.unbroken(Campaign(ADAPTER)).events[ADAPTER]
    campaign = Campaign(ADAPTER)
    (process,) = arena.start(campaign, folder, at=1 + events // 2)  # the second of two that are written, then read
    assert arena.nursery.wait(process) == -9, said(folder)
    going_on_makes_it_whole(arena, campaign, folder)


@pytest.mark.fault("kill -9 at operations on files of the run")
def test_a_run_that_was_killed_before_its_description_is_whole_begins_anew(arena: Arena) -> None:
    campaign, folder = Campaign("run.json"), arena.folder("no description")
    (process,) = arena.start(campaign, folder, at=2)  # 1: a draft is opened, 2: it gets its name
    assert arena.nursery.wait(process) == -9, said(folder)
    assert not (run_in(folder) / DESCRIPTION).exists()
    going_on_makes_it_whole(arena, Campaign(), folder)


@pytest.mark.fault("kill -9 during MLflow calls")
def test_what_a_kill_kept_from_mlflow_is_told_when_the_run_goes_on(arena: Arena) -> None:
    folder = Path(shutil.copytree(arena.unbroken(Campaign()).folder, arena.place / "told too little"))
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.execute("delete from metrics where step in (3, 12)")
        database.execute("delete from params")
        database.execute("update runs set status = 'RUNNING'")
        ((run, place),) = database.execute("select run_uuid, artifact_uri from runs").fetchall()
        there = f"{(folder / 'mlartifacts').as_uri()}/{place.partition('/mlartifacts/')[2]}"
        database.execute("update runs set artifact_uri = ?", [there])
    (artifacts,) = (folder / "mlartifacts").glob(f"*{run}/artifacts")
    for name in (CONFIG, f"completions/step-{LAST:06d}.json", f"problems/step-{LAST:06d}.json", ADAPTER):
        lost = artifacts / name
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    going_on_makes_it_whole(arena, Campaign(), folder)
