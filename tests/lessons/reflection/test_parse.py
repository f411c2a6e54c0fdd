from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogls.lessons.reflection.reply import MAX_IDEA, MAX_QUOTE, MAX_REPLY, parse_reflection
from ogls.records import Reflection

GOOD = '{"quote": "20-9=12", "idea": "Calculate 20-9 again."}'


@pytest.mark.parametrize("reply", [GOOD, f"\n {GOOD}\n", f"```json\n{GOOD}\n```", f"```\n{GOOD}\n```"])
def test_the_one_shape_that_is_read(reply: str):
    assert parse_reflection(reply, correct=False) == Reflection(quote="20-9=12", idea="Calculate 20-9 again.")
    assert parse_reflection(reply, correct=True) is None


def test_a_right_rollout_has_an_idea_and_no_quote():
    assert parse_reflection('{"idea": " Left to right. "}', correct=True) == Reflection(idea="Left to right.")
    assert parse_reflection('{"idea": "Left to right."}', correct=False) is None


HOSTILE = [
    "",
    "Sure! " + GOOD,
    GOOD + " Does this help?",
    GOOD + GOOD,
    f"[{GOOD}]",
    "null",
    '"quote"',
    "12",
    "NaN",
    GOOD.replace('"', "'"),
    GOOD[:-1],
    '{"quote": "20-9=12"}',
    '{"quote": "20-9=12", "idea": ""}',
    '{"quote": "  ", "idea": "again"}',
    '{"quote": "20-9=12", "idea": null}',
    '{"quote": "20-9=12", "idea": ["again"]}',
    '{"quote": {"x": 1}, "idea": "again"}',
    '{"quote": 20, "idea": "again"}',
    '{"quote": "20-9=12", "idea": "again", "more": 1}',
    '{"quote": "20-9=12", "quote": "12+8=20", "idea": "again"}',
    '{"Quote": "20-9=12", "idea": "again"}',
    '{"quote": "20-9=12", "idea": "\\u0000"}',
    '{"quote": "20-9=12", "idea": "\\ud800"}',
    '{"quote": "20-9=12", "idea": "a\\u001b[2J"}',
    '{"quote": "20-9=12", "idea": "\\boxed{11}"}',  # a bare backslash is another character in JSON
    json.dumps({"quote": "q" * (MAX_QUOTE + 1), "idea": "again"}),
    json.dumps({"quote": "20-9=12", "idea": "i" * (MAX_IDEA + 1)}),
    GOOD + " " * MAX_REPLY + "x",
    "[" * MAX_REPLY,
    '{"quote":' * 400,
    "9" * MAX_REPLY,
    "__import__('os').system('true')",
    '{"quote": __import__("os"), "idea": "x"}',
]


@pytest.mark.fault("reflector output as an attack")
@pytest.mark.parametrize("reply", HOSTILE)
def test_everything_else_is_not_read(reply: str):
    assert parse_reflection(reply, correct=False) is None
    assert parse_reflection(reply, correct=True) is None


@pytest.mark.fault("reflector output as an attack", tried=200)
@settings(max_examples=200)
@given(
    st.one_of(st.text(), st.recursive(st.text() | st.none() | st.integers(), st.lists).map(json.dumps)), st.booleans()
)
def test_no_text_is_too_odd(reply: str, correct: bool):
    found = parse_reflection(reply, correct)
    assert found is None or found.idea


@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=MAX_QUOTE))
def test_what_was_written_is_what_is_read(text: str):
    assert parse_reflection(json.dumps({"quote": text, "idea": text}), False) == Reflection(quote=text, idea=text)
