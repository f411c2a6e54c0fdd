"""Replies in LaTeX, from the command line to what is learned."""

from __future__ import annotations

import json
from pathlib import Path

from tests.faults.nursery import Nursery
from tests.test_cli import run_in, small


def test_a_run_reads_and_finds_what_a_reflector_quotes_from_latex(nursery: Nursery, tiny_model: Path, tmp_path: Path):
    rosd = ["--method", "ROSD", "--data.engine", "tests.scripted.LatexEngine", "--trainer.max_epochs", "1"]
    room = ["--data.max_tokens", "120", "--data.context_length", "500"]
    arguments = [word for word in small(tiny_model) if word not in ("--method.selection", "AllTokens")]
    code, output = run_in(nursery, "fit", *arguments, *rosd, *room, cwd=tmp_path)
    assert code == 0, output[-3000:]
    (metrics,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    steps = [row for row in map(json.loads, metrics.read_text().splitlines()) if "train/reflections" in row]
    assert len(steps) == 2
    for row in steps:
        assert row["train/reflections"] > 0
        assert row["train/reflection_parse_rate"] == row["train/reflection_located_rate"] == 1
        assert row["train/reflection_retry_rate"] == 0
        assert row["train/lessons"] == row["train/reflections"]
