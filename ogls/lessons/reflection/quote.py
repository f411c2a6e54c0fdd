"""A quote is found in a text even where white space or a few letters differ."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ogls.records import Span

_ORNAMENTS = frozenset("$*`\u200b\ufeff")
_SAME = str.maketrans("\u2018\u2019\u201c\u201d\u2212\u2013\u2014\u00d7\u00b7", "''\"\"---**")


class Match(NamedTuple):
    """A match is a place in a text and its similarity to the quote: 1 - edits / length of the quote."""

    span: Span
    similarity: float


def locate(text: str, quote: str, min_length: int, min_similarity: float) -> Match | None:
    """Returns the place of `quote` in `text` by the first of three ways that finds one; None where none does.

    1. The quote is looked for as it is. Of several places the first whole one is taken, where neither end cuts through
       a word or a number: in ``120-9=111, 20-9=11`` the quote ``20-9=11`` is the second. If none is whole, the first
       one is taken.
    2. Both texts are compared without white space and ornaments such as ``$`` and ``**``, in lower case, with plain
       quotation marks and dashes. Of several places, one is taken as above.
    3. The place with the fewest edits (Levenshtein) from the quote is taken, the first of equals, if its similarity
       is at least `min_similarity`.

    A quote with fewer than `min_length` of the characters that way 2 compares is not looked for, since it would be
    found anywhere.
    """
    letters, places = _plain(text)
    wanted, _ = _plain(quote)
    if len(wanted) < min_length:
        return None
    verbatim = _first_whole(text, [(at, at + len(quote)) for at in _occurrences(text, quote)])
    if verbatim is not None:
        return Match(verbatim, 1.0)
    spans = [(places[at], places[at + len(wanted) - 1] + 1) for at in _occurrences(letters, wanted)]
    plain = _first_whole(text, spans)
    if plain is not None:
        return Match(plain, 1.0)
    if not letters:
        return None
    (start, end), edits = _nearest(letters, wanted)
    similarity = 1.0 - edits / len(wanted)
    if similarity < min_similarity or start >= end:
        return None
    return Match((places[start], places[end - 1] + 1), similarity)


def _plain(text: str) -> tuple[str, list[int]]:
    """Returns the characters to compare, and the place in `text` that each of them comes from."""
    letters, places = [], []
    for place, character in enumerate(text):
        for letter in unicodedata.normalize("NFKC", character).translate(_SAME).lower():
            if not letter.isspace() and letter not in _ORNAMENTS:
                letters.append(letter)
                places.append(place)
    return "".join(letters), places


def _occurrences(text: str, quote: str) -> list[int]:
    found, at = [], text.find(quote)
    while at >= 0:
        found.append(at)
        at = text.find(quote, at + 1)
    return found


def _first_whole(text: str, spans: list[Span]) -> Span | None:
    def cut(at: int) -> bool:
        return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()

    whole = [span for span in spans if not cut(span[0]) and not cut(span[1])]
    return next(iter(whole or spans), None)


def _nearest(text: str, quote: str) -> tuple[Span, int]:
    """Returns the part of `text` with the fewest edits from `quote`, and their number (Sellers, 1980)."""
    edits = _edits(text, quote, np.zeros(len(text) + 1, dtype=np.int32))
    end = int(edits.argmin())
    # With the end fixed, the same table of the reversed texts says where the part begins. It is never longer than twice
    # the quote.
    before = text[max(0, end - 2 * len(quote)) : end]
    backwards = _edits(before[::-1], quote[::-1], np.arange(len(before) + 1, dtype=np.int32))
    return (end - int(backwards.argmin()), end), int(edits[end])


def _edits(text: str, quote: str, row: NDArray[np.int32]) -> NDArray[np.int32]:
    """Returns the number of edits between `quote` and the best part of `text` that ends at each place.

    `row` is the cost of beginning at each place. The table has one row per character of the quote. A step within a row
    costs 1, and a running minimum makes all steps at once: ``row[j] = min over i <= j of (start[i] + j - i)``.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    steps = np.arange(len(row), dtype=np.int32)
    for character in quote:
        start = row + 1
        start[1:] = np.minimum(start[1:], row[:-1] + (codes != ord(character)))
        row = np.minimum.accumulate(start - steps) + steps
    return row
