from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogls.model import load_tokenizer
from ogls.prompts import PromptEncoder, Prompts, count_reflection_markers
from ogls.records import Problem

PROBLEM = Problem(id="p", text="Is {attempt} a \\boxed{slot}?", answer="no")


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> PromptEncoder:
    return PromptEncoder(Prompts(system=""), load_tokenizer(tiny_model))


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"student": "Solve it."}, r"prompts.student needs the slot \{problem\} exactly once, got: 'Solve it.'"),
        ({"attempt": "{problem}"}, r"prompts.attempt needs the slot \{attempt\}"),
        ({"idea": "{problem} {idea} {idea}"}, r"prompts.idea needs the slot \{idea\} exactly once"),
    ],
)
def test_a_template_without_its_slot_is_refused(templates: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        Prompts(**templates)


def test_braces_in_what_is_filled_in_stay_as_they_are(encoder: PromptEncoder):
    text = encoder.decode(encoder.attempt(PROBLEM, "{problem} \\boxed{1}"))
    assert "Is {attempt} a \\boxed{slot}?" in text
    assert "here is one attempt at this problem:\n{problem} \\boxed{1}\n" in text


def test_views_differ_from_the_students_prompt_only_in_what_they_show(encoder: PromptEncoder):
    plain, view = encoder.decode(encoder.student(PROBLEM)), encoder.decode(encoder.attempt(PROBLEM, "X"))
    assert plain.endswith("assistant\n")
    assert view.endswith("assistant\n")
    assert "X" in view.replace(plain, "")


def test_a_problems_own_system_message_comes_before_the_common_one(tiny_model: Path):
    encoder = PromptEncoder(Prompts(system="common"), load_tokenizer(tiny_model))
    problem = Problem(id="p", text="?", answer="1", system="its own")
    assert "its own\n\ncommon" in encoder.decode(encoder.student(problem))


def test_bare_text_for_models_without_a_chat_template(tiny_model: Path):
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        PromptEncoder(Prompts(), tokenizer)
    bare = PromptEncoder(Prompts(chat=False, student="{problem} ="), tokenizer)
    assert bare.decode(bare.student(Problem(id="p", text="1+1", answer="2"))) == "1+1 ="


@given(st.text(max_size=60))
def test_offsets_cut_any_text_into_the_characters_of_its_tokens(encoder: PromptEncoder, text: str):
    ids = encoder.completion(text)
    decoded, spans = encoder.decode_offsets(ids)
    assert decoded == encoder.decode(ids)
    assert len(spans) == len(ids)
    assert all(low <= high for low, high in spans)
    assert spans[-1] == (len(decoded), len(decoded))  # the end token has no text
    covered = sorted({i for low, high in spans for i in range(low, high)})
    assert covered == list(range(len(decoded)))


def test_offsets_on_a_chain(encoder: PromptEncoder):
    text, spans = encoder.decode_offsets(encoder.completion("7+8=3"))
    assert "|".join(text[low:high] for low, high in spans[:-1]) == "7|+|8|=|3"


def test_reflection_markers_per_hundred_words():
    assert count_reflection_markers("Wait, that is wrong. Hold on: let me check") == pytest.approx(100 * 3 / 9)
    assert count_reflection_markers("") == 0
