"""Replies of a reflector are untrusted text: read as JSON of one exact shape, or not at all."""

from __future__ import annotations

import json
import re
from typing import Any

from ogls.records import Reflection
from ogls.tasks.answers import acceptable

MAX_REPLY = 4000
MAX_QUOTE = 500
MAX_IDEA = 1000

_FENCED = re.compile(r"```(?:json)?\n(.*)\n```", re.DOTALL)


def parse_reflection(reply: str, correct: bool) -> Reflection | None:
    """``{"quote": ..., "idea": ...}`` about a wrong rollout, ``{"idea": ...}`` about a right one; None for all else.

    Nothing may stand around the object but white space or a code fence. Values are texts, not empty, of at most
    `MAX_QUOTE` and `MAX_IDEA` characters, without control characters. A key too many, too few or twice is an error.
    """
    reply = reply.strip()
    if len(reply) > MAX_REPLY:
        return None
    fenced = _FENCED.fullmatch(reply)
    try:
        found = json.loads(fenced[1] if fenced else reply, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return None
    limits = {"idea": MAX_IDEA} if correct else {"quote": MAX_QUOTE, "idea": MAX_IDEA}
    if not isinstance(found, dict) or found.keys() != limits.keys():
        return None
    values = {name: value.strip() for name, value in found.items() if isinstance(value, str)}
    if any(name not in values or not acceptable(values[name], limit) for name, limit in limits.items()):
        return None
    return Reflection(idea=values["idea"], quote=values.get("quote"))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found
