"""Answers are found in a text, in time that is linear in its length.

This holds for any text, since texts are untrusted.
"""

from __future__ import annotations

import re

from ogls.records import Verdict

UNPARSABLE = Verdict(correct=False, status="unparsable")

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")


def last_boxed(text: str) -> str | None:
    r"""Returns what is inside the last complete ``\boxed{...}``; None where there is none.

    ``\{`` and ``\}`` do not count as braces.
    """
    found: tuple[int, int] | None = None
    open_braces: list[int | None] = []  # where a box's content starts; None for any other brace
    for token in _BRACES.finditer(text):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append(token.end())
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (found is None or start > found[0]):
                found = (start, token.start())
    return text[slice(*found)] if found else None


def last_tagged(text: str, tag: str = "answer") -> str | None:
    """Returns what is inside the last complete ``<answer>...</answer>``; None where there is none."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end] if start >= 0 else None


def acceptable(answer: str, max_length: int) -> bool:
    """Returns whether an answer has 1 to `max_length` characters, without control characters and lone surrogates."""
    return 0 < len(answer) <= max_length and not _UNPRINTABLE.search(answer)
