"""What a run is trained and judged on is told by split: how many problems, where from, the first few, a digest."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from ogls.tasks.base import ProblemSource

_DESCRIBED = 5  # problems shown per split
_DIGESTED = 100  # problems hashed per split: procedural ones may have very many


def problems_told(splits: Mapping[str, ProblemSource]) -> dict[str, dict[str, Any]]:
    """Returns what is trained and judged on: how many problems, how many left out, the first few, a digest."""
    described = {}
    for name, problems in splits.items():
        head = [problems[i] for i in range(min(_DIGESTED, len(problems)))]
        lines = "\n".join(f"{p.id}\t{p.text}\t{p.answer}" for p in head)
        described[name] = {
            "problems": len(problems),
            "source": problems.origin,
            "dropped": dict(problems.dropped),
            "digest": sha256(lines.encode("utf-8", "replace")).hexdigest()[:12],
            "first": [{"id": p.id, "text": p.text, "answer": p.answer} for p in head[:_DESCRIBED]],
        }
    return described
