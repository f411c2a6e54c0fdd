"""Two processes hold parts of the weights and an engine each: these load, compare and fail together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.nursery import Nursery
from tests.sharding.launcher import Ranks, gap, losses_gap, told

SETTINGS: dict[str, Any] = {"problems_per_step": 2, "steps": 6, "validates": 1, "learning_rate": 1e-5, "seed": 3}
FAULTS = {  # by rank: of the loads and calls of its engine, those that fail
    "one after the other": {"1": {"loads": [3]}, "0": {"calls": [17]}},
    "none": {},
    "in what the canary draws": {"1": {"calls": [0]}},
}
SLOW = [pytest.param(name, marks=[pytest.mark.slow] * (name != "one after the other")) for name in FAULTS]


@pytest.mark.fault("engine dies")
@pytest.mark.parametrize("fault", SLOW)
def test_two_engines_make_what_one_makes(fault: str, nursery: Nursery, tiny_model: Path, tmp_path: Path) -> None:
    """The reflector is frozen. One process has nothing to validate, and in some steps one has nothing to reflect on."""
    ranks = Ranks(nursery, tiny_model, tmp_path)
    one = ranks.run("one", 1, "ROSD", sincere={}, **SETTINGS)
    two = ranks.run("two", 2, "ROSD", sincere=FAULTS[fault], **SETTINGS)
    events = [told(two, rank)["engine"] for rank in (0, 1)]
    assert events[0].count("reflect") != events[1].count("reflect")
    assert sum(step["train/loss"] == 0 for step in told(one)["rows"]) == 1  # no stale gradient comes from the canary
    assert gap(two, one) < 1e-6
    for rank in (0, 1):
        assert losses_gap(two, one, rank) < 1e-6
    if fault == "none":
        loads = [event for event in told(one)["engine"] if event.startswith("load")]
        assert [[event for event in of if event.startswith("load")] for of in events] == [loads, loads]
