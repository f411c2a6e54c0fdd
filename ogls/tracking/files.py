"""The files in a run's folder tell its story without MLflow."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from ogls.records import Lane, Phase

METRICS = "metrics.jsonl"  # one row per line: step, time, metrics
TRACE = "trace.json"  # when each phase ran; https://ui.perfetto.dev and chrome://tracing show it, too
PROBLEMS = "problems"  # a folder: by validation, the accuracy of each held-out problem
CONFIG = "config.yaml"  # the resolved configuration
ROLLOUTS = "rollouts.jsonl"  # one sampled rollout per line, with what was said of it and learned from it
PROMPTS = "prompts.json"  # the prompts' templates by name
BEST = "best.json"  # step and metrics of the best validation
CHECKPOINTS, BEST_CHECKPOINT = "checkpoints", "best.ckpt"  # a folder, as Lightning calls it, and a file in it
ADAPTER = "best_adapter"  # a folder, and artifact
DESCRIPTION = "run.json"  # experiment, name, tags and parameters, as MLflow has them
# Names of the accuracy of all held-out problems, and of the subset that every validation samples.
WHOLE, SUBSET = re.compile(r"val/avg_at_\d+"), re.compile(r"val_subset/avg_at_\d+")
OF_SET = re.compile(r"val(?:_subset)?/[^/]+/avg_at_\d+")  # of each evaluation set, where there are several


def accuracies(names: Iterable[str]) -> list[str]:
    """Returns those of the names that are accuracies over the samples: of whole validations, then of parts."""
    known = list(names)
    parts = [name for name in known if SUBSET.fullmatch(name) or OF_SET.fullmatch(name)]
    return [name for name in known if WHOLE.fullmatch(name)] + parts


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


def read_trace(file: Path, keep_damaged: bool = False) -> list[Phase]:
    """Returns the phases of trace.json; lines that are damaged, or cut short by a kill, are left out.

    Args:
        file: path of trace.json
        keep_damaged: whether a file with damaged lines is copied to ``FILE.damaged``
    """
    events = _readable(file, "ph", keep_damaged)
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


def with_interval(row: Mapping[str, float], name: str) -> str:
    """Returns a metric of a row as text, with its interval where there is one: ``0.458 [0.421, 0.495]``."""
    text = f"{row[name]:.3f}"
    if f"{name}_low" not in row:
        return text
    return f"{text} [{row[f'{name}_low']:.3f}, {row.get(f'{name}_high', math.nan):.3f}]"


def read_rows(file: Path, keep_damaged: bool = False) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl; lines that are damaged, or cut short by a kill, are left out.

    Args:
        file: path of metrics.jsonl
        keep_damaged: whether a file with damaged lines is copied to ``FILE.damaged``
    """
    return _readable(file, "step", keep_damaged)


def _readable(file: Path, key: str, keep_damaged: bool) -> list[dict[str, Any]]:
    """Returns the objects with `key` among the lines. Of all others, only the last may have been cut short.

    A bracket on a line of its own, as trace.json begins, is no line of it.
    """
    found, damaged = [], 0
    *lines, last = file.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, last]):
        try:
            value = json.loads(line.removesuffix(b","))
        except ValueError:
            value = None
        if isinstance(value, dict) and key in value:
            found.append(value)
        elif number < len(lines) and line != b"[":
            damaged += 1
    if damaged and keep_damaged:
        aside = file.with_name(f"{file.name}.damaged")
        shutil.copyfile(file, aside)
        count = "a line" if damaged == 1 else f"{damaged} lines"
        print(f"{file}: {count} cannot be read and will be left out; the file as it was is {aside}", file=sys.stderr)
    return found


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces the whole file by these rows in one move."""
    replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def replace_text(file: Path, text: str) -> None:
    """Replaces the whole file by `text` in one move: after a kill it holds the old text or the new, never a part."""
    draft = file.with_name(f".{file.name}.draft")
    draft.write_text(text)
    draft.replace(file)


def check_checkpoint(path: Path) -> None:
    """Raises a ValueError of one line where there is no file of this name."""
    if path.is_dir():
        raise ValueError(f"--ckpt_path {path}: it is a folder; give a file, as runs/NAME/checkpoints/best.ckpt is one")
    if not path.is_file():
        raise ValueError(f"--ckpt_path {path}: there is no such file; a run's are in runs/NAME/checkpoints")
