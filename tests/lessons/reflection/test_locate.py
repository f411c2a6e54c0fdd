from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogls.lessons.reflection.quote import _nearest, locate


def found(text: str, quote: str, min_similarity: float = 0.9) -> str | None:
    match = locate(text, quote, 5, min_similarity)
    return None if match is None else f"{text[: match.span[0]]}[{text[slice(*match.span)]}]{text[match.span[1] :]}"


@pytest.mark.parametrize(
    ("text", "quote", "expected"),
    [
        ("9-4=5\n20-5=14\n14+7=21", "20-5=14", "9-4=5\n[20-5=14]\n14+7=21"),
        ("20-9=11, 20-9=11", "20-9=11", "[20-9=11], 20-9=11"),  # the first of several
        ("120-9=111, 20-9=11", "20-9=11", "120-9=111, [20-9=11]"),  # but a whole one before one cut out of numbers
        ("120-9=111", "20-9=11", "1[20-9=11]1"),
        ("9-4=5\n20-5=14", "20 - 5 = 14", "9-4=5\n[20-5=14]"),
        (
            "So $x^2 = 9$, **x = 3** or \u201c-3\u201d.",
            'SO X^2 = 9, x = 3 or "-3"',
            "[So $x^2 = 9$, **x = 3** or \u201c-3\u201d].",
        ),
        ("a \ufb01ne day for it", "fine day", "a [\ufb01ne day] for it"),  # a ligature is two letters
        ("the quick brown fox", "20-9=12", None),
        ("the quick brown fox", "fox", None),  # too short to mean this place
        ("the quick brown fox", " $ * ` $ ", None),
        ("", "20-9=12", None),
        ("     ", "20-9=12", None),
    ],
)
def test_places(text: str, quote: str, expected: str | None):
    assert found(text, quote) == expected


def test_a_few_edits_are_allowed_as_far_as_the_threshold_goes():
    text = "First add both sides, then divide by seven and take the root."
    misspelt = "then divde by seven and teke the root"  # 2 edits in 30 letters
    assert found(text, misspelt, 0.93) == "First add both sides, [then divide by seven and take the root]."
    assert found(text, misspelt, 0.94) is None
    assert found("20-5=14", "20-5=15") is None  # 1 in 7: another number is another quote
    assert locate(text, misspelt, 5, 0.5).similarity == pytest.approx(1 - 2 / 30)


def edits(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@given(st.text("ab1", min_size=1, max_size=9), st.text("ab1", min_size=1, max_size=5))
def test_the_nearest_part_of_a_text_is_that_of_a_search_through_all_parts(text: str, quote: str):
    (start, end), distance = _nearest(text, quote)
    parts = [text[i:j] for i in range(len(text) + 1) for j in range(i, len(text) + 1)]
    assert distance == min(edits(part, quote) for part in parts)
    assert edits(text[start:end], quote) == distance


@given(st.text(max_size=30), st.text(min_size=5, max_size=20), st.text(max_size=30))
def test_a_quote_that_is_there_is_found_as_it_is(before: str, quote: str, after: str):
    match = locate(before + quote + after, quote, 1, 0.9)
    if match is not None:  # None: nothing but white space and ornaments
        assert (before + quote + after)[slice(*match.span)] == quote
        assert match.similarity == 1


@given(st.text(max_size=60), st.text(max_size=30))
def test_no_text_and_no_quote_is_too_odd(text: str, quote: str):
    match = locate(text, quote, 1, 0.5)
    assert match is None or 0 <= match.span[0] < match.span[1] <= len(text)


def test_long_hostile_texts_take_a_moment():
    assert locate("a" * 30_000, "a" * 499 + "b", 5, 0.99).span == (0, 499)
    assert locate("abcd" * 7_500, "dcba" * 125, 5, 0.9) is None
