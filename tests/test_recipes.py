"""docs/recipes.md against the configurations that it describes, which are built here without loading weights."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from ogls.cli import OglsCLI, build
from ogls.tracking.config import flatten

ROOT = Path(__file__).resolve().parents[1]
TABLES = {
    name: [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines() if line.startswith("| ")]
    for name, text in re.findall(
        r"^## (\S+)\.yaml\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "recipes.md").read_text(), re.M | re.S
    )
}
ROWS = [(name, *row) for name, rows in TABLES.items() for row in rows[1:]]
RECIPES = {"qwen3_ogls_sd", "qwen3_opsd", "qwen3_rosd", "qwen3_sdpo", "qwen3_grpo"}


@cache
def built(name: str) -> OglsCLI:
    """What the file makes, with problems that need no download."""
    here = [word for split in ("train", "val", "test") for word in (f"--data.{split}", "Chains")]
    here += [word for split in ("train", "val", "test") for word in (f"--data.{split}.init_args.size", "8")]
    arguments, sys.argv = sys.argv, ["run.py"]
    try:
        made = build(["--config", f"{name}.yaml", *here, "--trainer.accelerator", "cpu"], run=False)
    finally:
        sys.argv = arguments
    made.datamodule.close()
    return made


def value(name: str, key: str) -> Any:
    """What the file says, or else what is made of it: numbers, words, and the names of classes."""
    said = flatten(yaml.safe_load((ROOT / "experiments" / f"{name}.yaml").read_text()))
    if key in said:
        return said[key]
    made, (first, *rest) = built(name), key.split(".")
    found: Any = {
        "method": made.model.method,
        "model": made.model,
        "policy": made.model.policy,
        "data": made.datamodule,
    }
    found = found[first]
    for part in rest:
        holder = found if hasattr(found, part) else found.sizes  # sizes of the text half stand together
        found = getattr(holder, part)
    plain = found is None or isinstance(found, bool | int | float | str | tuple | list)
    return found if plain else type(found).__name__


def test_every_recipe_has_a_table():
    assert TABLES.keys() == RECIPES == {path.stem for path in (ROOT / "experiments").glob("qwen3_*_*.yaml")} | RECIPES
    assert all(len(rows) > 20 for rows in TABLES.values())
    assert all(len(row) == 4 for row in ROWS for row in [row[1:]])


@pytest.mark.parametrize(("name", "key", "published", "here", "why"), ROWS, ids=lambda v: v if "." in v else "")
def test_the_file_is_what_the_table_says(name: str, key: str, published: str, here: str, why: str):
    got, told = value(name, key), yaml.safe_load(here)
    assert (list(got) if isinstance(got, tuple) else got) == told, f"{name}.yaml has {key} {got}"
    assert (published == here) == (not why), "a difference has a reason, and nothing else has"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_is_built_without_weights(name: str):
    made = built(name)
    assert "model" not in made.model.policy._modules
    assert made.model.method.name.startswith(made.config["method"]["class_path"].rpartition(".")[2])


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_samples_as_many_sequences_as_published(name: str):
    data = built(name).datamodule
    sequences = data.problems_per_step * data.mini_batches * data.sizes.group_size
    assert sequences == (32 if name in ("qwen3_ogls_sd", "qwen3_opsd") else 32 * 8)
