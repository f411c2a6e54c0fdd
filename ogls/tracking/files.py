"""The files of a run's folder that tell its story without MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"  # a row a line: step, time, metrics
CONFIG = "config.yaml"  # the resolved configuration
DESCRIPTION = "run.json"  # experiment, name, tags and parameters, as MLflow has them


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. A last line that a kill has cut short is left out."""
    *lines, rest = file.read_text().split("\n")
    rows = [json.loads(line) for line in lines]
    try:
        return [*rows, json.loads(rest)]
    except ValueError:
        return rows


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces the file by these rows, at once."""
    draft = file.with_name(f".{file.name}.draft")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.replace(file)
