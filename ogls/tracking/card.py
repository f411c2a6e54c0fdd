"""A card is the README of a folder that a trained model or adapter leaves in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ogls.tracking.files import DESCRIPTION, METRICS, read_rows, with_interval

_ACCURACY = re.compile(r"val/([^/]+/)?(avg|pass|maj)_at_\d+")


def card(run: Path, checkpoint: Path, saved: dict[str, Any], what: str, fits: str) -> str:
    """Returns what a folder says of itself: method, base, and accuracy before and after.

    Args:
        run: folder of the run
        checkpoint: file of the run that holds the weights
        saved: what is in the file
        what: what the folder holds, such as ``Adapter``
        fits: sentence on the base of the weights
    """
    told = json.loads((run / DESCRIPTION).read_text())["params"] if (run / DESCRIPTION).is_file() else {}
    rows = read_rows(run / METRICS) if (run / METRICS).is_file() else []
    rows = [row for row in rows if any(map(_ACCURACY.fullmatch, row)) and row["step"] <= saved["global_step"]]
    own = saved.get("ogls", {})
    lines = [f"# {run.name}, step {own.get('policy_version', saved['global_step'])}", ""]
    lines += [
        f"{what} trained by `{own.get('method', 'unknown')}`, seed {told.get('seed', 'unknown')}; {checkpoint.name}."
    ]
    lines += ["", fits, ""]
    if rows:
        before, after = rows[0], rows[-1]
        lines += [f"| held-out problems | step {before['step']} | step {after['step']} |", "|---|---:|---:|"]
        for name in (name for name in after if _ACCURACY.fullmatch(name)):
            cells = (with_interval(row, name) if name in row else "" for row in (before, after))
            lines.append(f"| {name.removeprefix('val/')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
