from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogls.lessons.prompts import Prompts
from ogls.lessons.reflection.quote import locate
from ogls.lessons.reflection.reply import MAX_IDEA, MAX_QUOTE, parse_reflection
from ogls.records import Reflection

TAGS = "<quote>20-9=12</quote> <idea>Calculate 20-9 again.</idea>"
GOOD = '{"quote": "20-9=12", "idea": "Calculate 20-9 again."}'
BOTH = Reflection(quote="20-9=12", idea="Calculate 20-9 again.")


@pytest.mark.parametrize(
    "reply",
    [
        TAGS,
        f"Sure!\n\n{TAGS}\nHope this helps.",
        "<idea> Calculate 20-9 again.\n</idea>\n<quote>\n20-9=12</quote>",
        f"<think>\nIs it <quote>12+8=20</quote>?\n</think>\n\n{TAGS}",
        f"The prompt opened the thought: <idea>none</idea></think>{TAGS}",
        f"<quote>12+8=20</quote><idea>No, wait.</idea>{TAGS}",
        f"<quote>{TAGS}",
        f"{TAGS} {GOOD.replace('12', '13')}",
        GOOD,
        f"\n {GOOD}\n",
        f"```json\n{GOOD}\n```",
        f"```json\n{GOOD}\n```\nHope this helps!",
        f"Here is the JSON for \\frac{{1}}{{2}}: {GOOD}",
        f"<think>\n\n</think>\n\n{GOOD}",
        f"[{GOOD}]",
        GOOD.replace("20", "30") + GOOD,
        '{"quote": "20-9=12", "idea": "Calculate 20-9 again.", "line": 2}',
        '{"quote": "12+8=20", "quote": "20-9=12", "idea": "Calculate 20-9 again."}',
    ],
)
def test_a_quote_and_an_idea_are_found_whatever_stands_around_them(reply: str):
    assert parse_reflection(reply, correct=False) == BOTH
    assert parse_reflection(reply, correct=True) == Reflection(idea="Calculate 20-9 again.")


def test_a_right_rollout_has_an_idea_and_no_quote():
    for reply in ("<idea>Left to right.</idea>", '{"idea": " Left to right. "}'):
        assert parse_reflection(reply, correct=True) == Reflection(idea="Left to right.")
        assert parse_reflection(reply, correct=False) is None


ATTEMPT = r"We have \frac{1}{2} x = 3, so x = 3 \cdot 2 = 5. Then \sqrt{x+4} \neq 3 and \boxed{3}, \times\nu."
MODELS = {  # what models write about it, of which the last two lines are of a right rollout
    "escaped": (r'{"quote": "so x = 3 \\cdot 2 = 5", "idea": "multiply"}', r"so x = 3 \cdot 2 = 5"),
    "cdot": (r'{"quote": "so x = 3 \cdot 2 = 5", "idea": "multiply"}', r"so x = 3 \cdot 2 = 5"),
    "frac": (r'{"quote": "We have \frac{1}{2} x = 3", "idea": "multiply"}', r"We have \frac{1}{2} x = 3"),
    "sqrt": (r'{"quote": "Then \sqrt{x+4} \neq 3", "idea": "square"}', r"Then \sqrt{x+4} \neq 3"),
    "boxed": (r'{"quote": "and \boxed{3}", "idea": "check the sum"}', r"and \boxed{3}"),
    "times": (r'{"quote": "\boxed{3}, \times\nu", "idea": "multiply"}', r"\boxed{3}, \times\nu"),
    "sentence": ('Here is the JSON:\n{"quote": "so x = 3", "idea": "b"}', "so x = 3"),
    "think": ('<think>\n\n</think>\n\n{"quote": "so x = 3", "idea": "b"}', "so x = 3"),
    "newline": ('{"quote": "so\nx = 3", "idea": "b"}', "so x = 3"),
    "escaped newline": (r'{"quote": "5.\nThen", "idea": "b"}', "5. Then"),
    "long idea": (json.dumps({"quote": "so x = 3", "idea": "a " * 550}), "so x = 3"),
    "more keys": ('{"quote": "so x = 3", "idea": "b", "line": 2}', "so x = 3"),
    "fence": ('```json\n{"quote": "so x = 3", "idea": "b"}\n```\nHope this helps!', "so x = 3"),
    "tags": (r"<quote>and \boxed{3}, \times\nu</quote><idea>\(a\)</idea>", r"and \boxed{3}, \times\nu"),
    "idea alone": (r'{"idea": "use \(a^2-b^2\)"}', None),
}


@pytest.mark.parametrize("kind", MODELS)
def test_latex_in_a_reply_is_read_and_found_where_it_was_copied_from(kind: str):
    reply, place = MODELS[kind]
    found = parse_reflection(reply, correct=place is None)
    assert found is not None
    if place is None:
        assert found.idea == r"use \(a^2-b^2\)"
    else:
        match = locate(ATTEMPT, found.quote or "", 5, 0.9)
        assert match is not None
        assert ATTEMPT[slice(*match.span)] == place


HOSTILE = [
    "",
    "null",
    '"quote"',
    "12",
    "NaN",
    "<idea></idea>",
    "<quote>20-9=12</quote>",
    "<quote>20-9=12<idea>again",
    "</quote>20-9=12<quote></idea>again<idea>",
    "<quote>20-9=12</quote><idea>a\x1b[2J</idea>",
    f"<think>{TAGS}",
    f"{TAGS}</think>",
    f"<quote>20-9=12</quote><idea>{'i' * (MAX_IDEA + 1)}</idea>",
    GOOD.replace('"', "'"),
    GOOD[:-1],
    GOOD.replace('"', '\\"'),
    '{"quote": "20-9=12"}',
    '{"quote": "20-9=12", "idea": ""}',
    '{"quote": "20-9=12", "idea": null}',
    '{"quote": "20-9=12", "idea": ["again"]}',
    '{"quote": "20-9=12", "idea": "\\u0000"}',
    '{"quote": "20-9=12", "idea": "\\ud800"}',
    '{"quote": "20-9=12", "idea": "a\\u001b[2J"}',
    json.dumps({"quote": "20-9=12", "idea": "i" * (MAX_IDEA + 1)}),
    "[" * 100_000,
    "<quote>" * 100_000,
    "{" + " " * 100_000,
    '{"quote":' * 20_000,
    '{"quote":' + "[" * 100_000,
    '{"quote": "' + "\\" * 100_001,
    "9" * 100_000,
    "__import__('os').system('true')",
    '{"quote": __import__("os"), "idea": "x"}',
]


@pytest.mark.fault("reflector output as an attack")
@pytest.mark.parametrize("reply", HOSTILE)
def test_everything_else_is_not_read(reply: str):
    assert parse_reflection(reply, correct=False) is None
    assert parse_reflection(reply, correct=True) is None


@pytest.mark.fault("reflector output as an attack")
@pytest.mark.parametrize("quote", ['{"x": 1}', "20", '"  "', '"\\u0000"', f'"{"q" * (MAX_QUOTE + 1)}"'])
def test_a_quote_that_cannot_be_one_is_no_reply_about_a_wrong_rollout(quote: str):
    assert parse_reflection(f'{{"quote": {quote}, "idea": "again"}}', correct=False) is None


@pytest.mark.fault("reflector output as an attack", tried=200)
@settings(max_examples=200)
@given(
    st.one_of(st.text(), st.recursive(st.text() | st.none() | st.integers(), st.lists).map(json.dumps)), st.booleans()
)
def test_no_text_is_too_odd(reply: str, correct: bool):
    found = parse_reflection(reply, correct)
    assert found is None or found.idea


WRITTEN = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=MAX_QUOTE)


@given(WRITTEN)
def test_what_was_written_is_what_is_read(text: str):
    whole = Reflection(quote=text, idea=text)
    assert parse_reflection(json.dumps({"quote": text, "idea": text}), False) == whole
    assert parse_reflection(f"<quote>{text}</quote><idea>{text}</idea>", False) == whole


@pytest.mark.parametrize("template", [Prompts().reflect_wrong, Prompts().reflect_right])
def test_the_prompts_ask_for_what_is_read(template: str):
    asked = template.partition("Reply with nothing but ")[2]
    found = parse_reflection(asked, correct="<quote>" not in asked)
    assert found is not None
    assert (found.quote, found.idea) == ("the place" if "<quote>" in asked else None, "the idea")


# ---- sentences of real solutions, quoted as they are ----

DATA = Path(os.environ.get("OGLS_DATA", Path(__file__).parents[4] / "shared" / "data"))


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Start and text of every sentence and every line with a letter or digit, the unit that the prompts ask for."""
    for found in re.finditer(r"[^\n]+?(?:(?<!\bMr)(?<!\bMs)(?<!\bMrs)[.!?](?=\s)|(?=\n)|$)", text):
        stripped = found[0].strip()
        if any(map(str.isalnum, stripped)):
            yield found.start() + found[0].index(stripped), stripped


def by_tags(sentence: str) -> str:
    return f"<quote>{sentence}</quote>\n<idea>Think.</idea>"


def as_json(sentence: str) -> str:
    """As models write it that do not escape backslashes; quotation marks they do."""
    escaped = sentence.replace('"', '\\"')
    return f'{{"quote": "{escaped}", "idea": "Think."}}'


WHOLE = [pytest.param(name, 1, marks=pytest.mark.slow) for name in ("gsm8k/train", "gsm8k/test")]


@pytest.mark.parametrize("write", [by_tags, as_json])
@pytest.mark.parametrize(("name", "every"), [("aime24/test", 1), ("gsm8k/test", 10), *WHOLE])
def test_of_all_sentences_of_solutions_quoted_raw_99_percent_are_located(
    name: str, every: int, write: Callable[[str], str], record_property: Callable[[str, object], None]
):
    file = DATA / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"no {file}; OGLS_DATA names the folder that holds gsm8k and aime24")
    right = []
    for row in map(json.loads, file.read_text().strip().split("\n")[::every]):
        text = row["solution"]
        for start, sentence in sentences(text):
            read = parse_reflection(write(sentence), correct=False)
            match = read and read.quote and locate(text, read.quote, 5, 0.9)
            # where it was taken from, or an equal sentence before it
            right.append(bool(match) and match.span[0] <= start and text.startswith(sentence, match.span[0]))
    record_property("located", f"{sum(right) / len(right):.4f} of {len(right)}")
    assert sum(right) / len(right) >= 0.99
