"""Several processes that each hold a part of the weights make what one process makes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import write_model

from ogls import methods
from ogls.callbacks.checkpoint_io import read_manifest
from tests.faults.nursery import Nursery
from tests.sharding.launcher import Ranks, gap, losses_gap, told
from tests.sharding.ranks import CASES, CHECKPOINT

FAST = ("mixture", "lora mixture")
SHARES = {2: 0.51, 4: 0.26}
ROUNDED = "bfloat16"  # in the names of cases whose sums depend on the cut into micro-batches by more


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights whose rows cannot be shared out evenly."""
    return write_model(tmp_path_factory.mktemp("models") / "odd-llama", intermediate_size=127)


@pytest.fixture
def ranks(nursery: Nursery, odd_model: Path, tmp_path: Path) -> Ranks:
    return Ranks(nursery, odd_model, tmp_path)


def check(ranks: Ranks, case: str, size: int, steps: int) -> None:
    one, several = (ranks.run(f"of-{count}", count, case, steps=steps) for count in (1, size))
    exact = 1e-3 if ROUNDED in case else 1e-6
    assert gap(several, one) < exact
    assert gap(several, one, "merged.pt") < exact
    assert len(told(several)["rows"]) == steps
    for rank in range(size):
        assert losses_gap(several, one, rank) < exact
        held, whole = told(several, rank)["held"], told(one)["held"]
        assert {name for name, count in whole.items() if count} >= {"weights", "gradients", "Adam"}
        for name, count in whole.items():
            assert held[name] <= SHARES[size] * count, name


@pytest.mark.parametrize("case", FAST)
def test_two_processes_make_what_one_makes(case: str, ranks: Ranks) -> None:
    check(ranks, case, 2, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_several_processes_make_what_one_makes(case: str, size: int, ranks: Ranks) -> None:
    check(ranks, case, size, steps=8)


APART = {"OnPolicyDistillation"}  # needs another model, which is the case "other model"
APART |= {"ROSDShuffled"}  # a control that exchanges ideas among the problems of one process


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({*methods.__all__} - {"Method"} - APART))
def test_every_method_as_published_makes_the_same_steps(
    method: str, nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    ranks = Ranks(nursery, tiny_model, tmp_path)
    one, two = (ranks.run(f"of-{size}", size, method, steps=2) for size in (1, 2))
    assert gap(two, one) < 1e-6
    assert losses_gap(two, one) < 1e-6
    assert any(row["train/loss"] for row in told(one)["rows"])


def test_a_checkpoint_goes_from_one_process_to_two_and_back(ranks: Ranks) -> None:
    """After four steps two go on from what one has saved, and one from what two have."""
    case, half = "ema", {"steps": 2}
    begun = {size: ranks.run(f"begun-{size}", size, case, save=True, **half) for size in (1, 2)}
    saved = {size: torch.load(place / CHECKPOINT, weights_only=True) for size, place in begun.items()}
    assert read_manifest(begun[2] / CHECKPOINT)["holds"] == read_manifest(begun[1] / CHECKPOINT)["holds"]
    assert saved[1]["optimizer_states"][0]["state"].keys() == saved[2]["optimizer_states"][0]["state"].keys()
    for name, value in saved[1]["ogls"]["teacher"].items():
        torch.testing.assert_close(saved[2]["ogls"]["teacher"][name], value, rtol=0, atol=1e-6)
    ends = [goes_on(ranks, begun[before], after, case, **half) for before, after in ((1, 1), (1, 2), (2, 1))]
    assert gap(ends[1], ends[0]) < 1e-6
    assert gap(ends[2], ends[0]) < 1e-6


def goes_on(ranks: Ranks, begun: Path, size: int, case: str, **settings: Any) -> Path:
    folder = f"{begun.name}-{size}"
    (ranks.place / folder).mkdir()
    shutil.copy(begun / CHECKPOINT, ranks.place / folder)
    return ranks.run(folder, size, case, goes_on=True, **settings)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 32 processes in all
@pytest.mark.parametrize("case", ["ema", "lora ema", "mixture"])
def test_a_checkpoint_goes_from_one_process_to_two_to_four_and_back(case: str, ranks: Ranks) -> None:
    begun = {size: ranks.run(f"begun-{size}", size, case, save=True, steps=4) for size in (1, 2, 4)}
    end = goes_on(ranks, begun[1], 1, case, steps=4)
    for before, after in ((1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)):
        assert gap(goes_on(ranks, begun[before], after, case, steps=4), end) < 1e-6, (before, after)


@pytest.mark.slow
def test_processes_of_a_node_read_no_more_than_one_copy_of_the_weights(
    nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    """Four processes hold one copy in fp32 together, and little more at any time; each whole copy would be one more."""
    model = write_model(tmp_path / "wide", hidden_size=512, intermediate_size=4096, num_hidden_layers=12)
    place = Ranks(nursery, tiny_model, tmp_path, "load_sharded").run("loaded", 4, str(model))
    loaded = [json.loads((place / f"loaded-{rank}.json").read_text()) for rank in range(4)]
    copy = sum(row["weights"] for row in loaded)
    assert copy > 300e6
    assert sum(row["most"] for row in loaded) < 1.25 * copy, loaded
    assert sum(row["teacher"] for row in loaded) == pytest.approx(copy, rel=0.02)
    for row in loaded:  # passes hold a few layers at a time, and leave none
        assert row["in passes"] < row["weights"] + 5 * copy / 12, loaded
        assert row["after passes"] < 1.25 * row["weights"] + 10e6, loaded


@pytest.mark.fault("out of memory")
@pytest.mark.parametrize(
    ("where", "case"),
    [
        ("loss", "frozen"),
        ("layer", "frozen"),
        pytest.param("layer", "lora bfloat16", marks=pytest.mark.slow),  # with gradient checkpointing
        pytest.param("other", "other model", marks=pytest.mark.slow),
    ],
)
def test_memory_that_runs_out_in_one_process_halves_the_micro_batches_of_all(
    where: str, case: str, ranks: Ranks
) -> None:
    one, two = ranks.run("one", 1, case, steps=1), ranks.run("two", 2, case, steps=1, room=40, where=where)
    assert [told(two, rank)["tokens"] for rank in (0, 1)] == [37, 37]
    exact = 1e-3 if ROUNDED in case else 1e-6
    assert gap(two, one) < exact
    assert losses_gap(two, one) < exact


@pytest.mark.fault("out of memory")
def test_memory_that_runs_out_in_a_gradient_ends_all(ranks: Ranks) -> None:
    began = time.monotonic()
    place, codes = ranks.start("gradient", 2, "frozen", steps=1, room=40, where="gradient")
    assert time.monotonic() - began < 60
    assert 0 not in codes
    assert "memory ran out in process 1, for which all others wait" in (place / "ended-1.txt").read_text()


@pytest.mark.fault("kill -9 in the middle of a run")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_all(killed: int, ranks: Ranks) -> None:
    began = time.monotonic()
    _, codes = ranks.start("killed", 2, "frozen", killed=killed)
    assert time.monotonic() - began < 60
    assert codes[killed] == -9
    assert codes[1 - killed] not in (0, -9)
