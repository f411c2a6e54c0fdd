"""The files in a run's folder tell its story without MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from ogls.records import Lane, Phase

METRICS = "metrics.jsonl"  # one row per line: step, time, metrics
TRACE = "trace.json"  # when each phase ran; https://ui.perfetto.dev and chrome://tracing show it, too
CONFIG = "config.yaml"  # the resolved configuration
DESCRIPTION = "run.json"  # experiment, name, tags and parameters, as MLflow has them


_LANES: tuple[Lane, ...] = get_args(Lane)
TRACE_HEAD = "[\n" + "".join(
    json.dumps({"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": lane}}) + ",\n"
    for number, lane in enumerate(_LANES)
)


def trace_lines(phases: Iterable[Phase]) -> str:
    """Returns one line per phase, as a complete event in Chrome's JSON array format.

    The format's closing bracket may be missing, so lines can be added to the file at any time.
    """
    events = (
        {
            "ph": "X",
            "name": i.name,
            "pid": 0,
            "tid": _LANES.index(i.lane),
            "ts": round(1e6 * i.start),
            "dur": round(1e6 * (i.end - i.start)),
            "args": {"step": i.step},
        }
        for i in phases
    )
    return "".join(json.dumps(event) + ",\n" for event in events)


def read_trace(file: Path) -> list[Phase]:
    """Returns the phases of trace.json. A last line that a kill has cut short is left out."""
    events = [json.loads(line.removesuffix(",")) for line in file.read_text().split("\n")[1:-1]]
    return [
        Phase(
            lane=_LANES[event["tid"]],
            name=event["name"],
            step=event["args"]["step"],
            start=1e-6 * event["ts"],
            end=1e-6 * (event["ts"] + event["dur"]),
        )
        for event in events
        if event["ph"] == "X"
    ]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl. A last line that a kill has cut short is left out."""
    *lines, rest = file.read_text().split("\n")
    rows = [json.loads(line) for line in lines]
    try:
        return [*rows, json.loads(rest)]
    except ValueError:
        return rows


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces the whole file by these rows in one move."""
    replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def replace_text(file: Path, text: str) -> None:
    """Replaces the whole file by `text` in one move: after a kill it holds the old text or the new, never a part."""
    draft = file.with_name(f".{file.name}.draft")
    draft.write_text(text)
    draft.replace(file)
