"""Replies of a reflector are untrusted: JSON of one exact shape, or not read."""

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
    """Returns the reflection that a reply states; None for a reply of any other form.

    The form is ``{"quote": ..., "idea": ...}`` about a wrong rollout and ``{"idea": ...}`` about a right one. Only
    white space or a code fence may stand around the object. Values are texts that are not empty, have at most
    `MAX_QUOTE` and `MAX_IDEA` characters and no control characters. No key may be missing, unknown or repeated.
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
