r"""Replies of a reflector are untrusted: a quote and an idea are found in them, by tags or else as JSON.

The prompts ask for ``<quote>...</quote>`` and ``<idea>...</idea>``, between which any text stands as it is, LaTeX
included. JSON is read because models like to write it, although few escape the backslashes of LaTeX there.
"""

from __future__ import annotations

import json
import re

from ogls.records import Reflection
from ogls.tasks.answers import acceptable, last_tagged

MAX_QUOTE = 1000
MAX_IDEA = 2000

_OBJECT = re.compile(r'\{\s*"(?:quote|idea)"\s*:')
_LINE = r"n(?!(?:abla|eq?|eg|leq|geq|mid|ot|otin|u)(?![a-zA-Z]))"  # \nabla is LaTeX, \nThen a line
_BACKSLASH = re.compile(rf'(\\(?:["\\/]|u[0-9a-fA-F]{{4}}|{_LINE}|[bfrt](?![a-zA-Z])))|\\')
_JSON = json.JSONDecoder(strict=False)  # lines may break within a text


def parse_reflection(reply: str, correct: bool) -> Reflection | None:
    r"""Returns the reflection that a reply states: an idea, and a quote about a wrong rollout; None where it lacks one.

    The last ``<quote>`` and the last ``<idea>`` count, whatever stands around them. Where they are missing, the last
    JSON object that begins with the key ``quote`` or ``idea`` counts; a backslash in it that begins no escape of JSON,
    as in ``\cdot`` or ``\frac``, is taken for itself. What comes before ``</think>`` is ignored. Quote and idea have at
    most `MAX_QUOTE` and `MAX_IDEA` characters and no control characters.
    """
    said = reply.rpartition("</think>")[2]
    if said.lstrip().startswith("<think>"):  # cut off in the midst of thinking
        return None
    limits = {"idea": MAX_IDEA} if correct else {"quote": MAX_QUOTE, "idea": MAX_IDEA}
    for found in ({name: last_tagged(said, name) for name in limits}, _last_object(said)):
        texts = {name: value.strip() for name in limits if isinstance(value := found.get(name), str)}
        if all(name in texts and acceptable(texts[name], limit) for name, limit in limits.items()):
            return Reflection(idea=texts["idea"], quote=texts.get("quote"))
    return None


def _last_object(text: str) -> dict[str, object]:
    """Returns the last JSON object with a key ``quote`` or ``idea`` at its beginning; an empty one where none is."""
    start = max((found.start() for found in _OBJECT.finditer(text)), default=None)
    if start is None:
        return {}
    try:
        return _JSON.raw_decode(_BACKSLASH.sub(lambda found: found[1] or r"\\", text[start:]))[0]
    except (ValueError, RecursionError):
        return {}
