"""Which rollouts are reflected on, by whom, and what the reflections are worth."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ogls.lessons.prompts import PromptEncoder, Prompts
from ogls.lessons.reflection.exact import ExactReflector
from ogls.lessons.reflection.metrics import answer_in, without_answer
from ogls.lessons.reflection.model import ModelReflector
from ogls.lessons.reflection.privilege import CorrectiveIdea, LocatedSolution
from ogls.lessons.reflection.reflector import ReflectionCase, ReflectionLimits, Reflector, exchange_ideas
from ogls.policy.pretrained import load_tokenizer
from ogls.records import Problem, Reflection
from ogls.tasks.chains import ChainErrors
from tests.lessons.reflection.made import OTHER, RIGHT, SUM, WRONG, Scripted, context, group, reply, rollout

TRUTH = ChainErrors()


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> PromptEncoder:
    return PromptEncoder(Prompts(system="", views={"idea": "{problem} {text}"}), load_tokenizer(tiny_model))


@dataclass(frozen=True, kw_only=True)
class Noted(Reflector):
    cases: list[ReflectionCase] = field(default_factory=list)

    def answer(self, cases: Any, context: Any) -> Any:
        self.cases.extend(cases)
        return [Reflection(idea=f"idea {i}") for i in range(len(cases))], {}


def test_only_groups_with_both_outcomes_are_reflected_on_and_right_rollouts_take_turns(encoder: PromptEncoder):
    right, wrong = RIGHT["sum"], WRONG["sum"]
    groups = [
        group(encoder, SUM, right, right),
        group(encoder, OTHER, WRONG["other"], WRONG["other"]),
        group(encoder, SUM, wrong, right, wrong, right + " ", wrong),
    ]
    for right_rollouts, expected in ((True, [0, 1, 2, 3, 4]), (False, [0, 2, 4])):
        reflector = Noted(right_rollouts=right_rollouts)
        made, _ = reflector.reflect(groups, context(Scripted(encoder, lambda *_: "")))
        assert [made[g].rollouts[r].reflection for g in (0, 1) for r in (0, 1)] == [None] * 4
        assert [r for r, x in enumerate(made[2].rollouts) if x.reflection] == expected
        solutions = [case.solution for case in reflector.cases if not case.rollout.correct]
        assert solutions == [right, right + " ", right]
        assert all(case.solution == "" for case in reflector.cases if case.rollout.correct)


def test_the_exact_reflector_is_where_the_exact_locator_is(encoder: PromptEncoder):
    groups = [group(encoder, p, RIGHT[p.id], WRONG[p.id]) for p in (SUM, OTHER)]
    (one, two), rates = ExactReflector().reflect(groups, context(Scripted(encoder, lambda *_: ""), TRUTH))
    assert one.rollouts[0].reflection == Reflection(idea="Calculate from left to right.")
    assert one.rollouts[1].reflection == Reflection(idea="Calculate 20-9 again.", quote="20-9=12", span=(14, 15))
    assert two.rollouts[1].reflection == Reflection(idea="Start with the parentheses.", quote="20-9=11", span=(0, 2))
    assert rates["reflection_located_rate"] == 1
    for name in ("line_precision", "line_recall", "token_precision", "token_recall"):
        assert rates[f"reflection_{name}"] == 1


def test_rates_worked_by_hand(encoder: PromptEncoder):
    """Wrong chains of 27 and 33 tokens, one with its quote, one with a quote of another line, and two right ones."""
    quotes = {WRONG["sum"]: "20-9=12", WRONG["other"]: "7+7=14"}

    def script(prompt: str, turn: int) -> str:
        wrong = next((text for text in quotes if text in prompt), None)
        return reply(quotes[wrong], "It is 11.") if wrong else "no idea"

    groups = [group(encoder, p, RIGHT[p.id], WRONG[p.id]) for p in (SUM, OTHER)]
    made, rates = ModelReflector(retries=0).reflect(groups, context(Scripted(encoder, script), TRUTH))
    assert len(made[0].rollouts[1].completion.token_ids) == 8 + 8 + 10 + 1
    assert rates == {
        "reflections": 2,
        "reflection_parse_rate": 1 / 2,
        "reflection_leak_rate": 1 / 2,  # 11 is the answer of the first
        "reflection_located_rate": 1,
        "reflection_start": pytest.approx((8 / 27 + 15 / 33) / 2),
        "reflection_line_precision": 1 / 2,
        "reflection_line_recall": 1 / 2,
        "reflection_token_precision": pytest.approx(1 / (7 + 6)),  # the error is the 2 of 12
        "reflection_token_recall": pytest.approx(1 / (1 + 2)),  # and the 20 of the other chain
        "reflection_retry_rate": 0,
        "reflection_cut_rate": 0,
        "reflection_shortened_rate": 0,
        "dropped_reflection_too_long": 0,
    }


def test_a_rate_of_nothing_is_left_out(encoder: PromptEncoder):
    _, rates = ModelReflector().reflect(
        [group(encoder, SUM, RIGHT["sum"])], context(Scripted(encoder, lambda *_: ""), TRUTH)
    )
    assert rates == {"reflections": 0}


def test_a_bad_reply_is_asked_for_once_more_with_another_seed(encoder: PromptEncoder):
    replies = {
        (SUM.id, 0): reply("20-9=12", "good at once"),
        (SUM.id, 1): "not asked",
        (OTHER.id, 0): "<|im_end|> __import__('os').system('true')",
        (OTHER.id, 1): reply("20-9=11", "good at last"),
    }

    def script(prompt: str, turn: int) -> str:
        return replies[SUM.id if SUM.text in prompt else OTHER.id, turn]

    asked = Scripted(encoder, script)
    groups = [group(encoder, p, WRONG[p.id], RIGHT[p.id]) for p in (SUM, OTHER)]
    reflector = ModelReflector(right_rollouts=False, weights="frozen")
    (one, two), rates = reflector.reflect(groups, context(asked))
    assert one.rollouts[0].reflection == Reflection(idea="good at once", quote="20-9=12", span=(8, 15))
    assert two.rollouts[0].reflection == Reflection(idea="good at last", quote="20-9=11", span=(0, 7))
    assert rates["reflection_retry_rate"] == 1 / 2
    assert [len(prompts) for prompts in asked.prompts] == [2, 1]
    assert len(set(asked.seeds)) == 2


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            reply("20-9=1 2.", "near"),
            reply("never written", "far"),
            Reflection(idea="near", quote="20-9=1 2.", span=(8, 15)),
        ),
        (
            reply("never written", "far"),
            reply("20-9=1 2.", "near"),
            Reflection(idea="near", quote="20-9=1 2.", span=(8, 15)),
        ),
        (reply("never written", "far"), "garbage", Reflection(idea="far", quote="never written")),
        ("garbage", "garbage", None),
    ],
)
def test_the_best_of_both_replies_counts(encoder: PromptEncoder, first: str, second: str, expected: Reflection | None):
    asked = Scripted(encoder, lambda prompt, turn: (first, second)[turn])
    reflector = ModelReflector(right_rollouts=False, min_similarity=0.85)
    (made,), _ = reflector.reflect([group(encoder, SUM, WRONG["sum"], RIGHT["sum"])], context(asked))
    assert made.rollouts[0].reflection == expected


def test_prompts_are_shortened_or_left_out_and_counted(encoder: PromptEncoder):
    text = WRONG["sum"]
    texts = [text, RIGHT["sum"] + " " + "so " * 400]
    asked = Scripted(encoder, lambda *_: reply("20-9=12", "again"))
    whole = len(encoder.reflect(SUM, text, False, texts[1]))
    reflector = ModelReflector(right_rollouts=False, retries=0)
    of = [group(encoder, SUM, *texts)]
    (made,), rates = reflector.reflect(of, context(asked, prompt_tokens=whole - 1))
    assert rates["reflection_shortened_rate"] == 1
    assert made.rollouts[0].reflection is not None

    (made,), rates = reflector.reflect(of, context(asked, prompt_tokens=100))
    assert rates["dropped_reflection_too_long"] == 1
    assert made.rollouts[0].reflection is None
    assert len(asked.prompts) == 1


def test_a_reply_that_hits_its_limit_is_counted(encoder: PromptEncoder):
    asked = Scripted(encoder, lambda *_: reply("20-9=12", "again and again"))
    reflector, of = ModelReflector(right_rollouts=False), [group(encoder, SUM, WRONG["sum"], RIGHT["sum"])]
    (made,), rates = reflector.reflect(of, context(asked, max_tokens=20))
    assert made.rollouts[0].reflection is None
    assert rates["reflection_cut_rate"] == 1


def test_shuffled_ideas_come_from_other_problems_and_places_stay(encoder: PromptEncoder):
    third = Problem(id="third", text="?", answer="1")
    owners = [(SUM, False), (SUM, False), (SUM, True), (OTHER, False), (third, False), (third, True)]
    cases = [ReflectionCase(problem=p, rollout=rollout(encoder, "x", correct)) for p, correct in owners]
    found = [Reflection(idea=str(i), quote=str(i), span=(i, i + 1)) for i in range(6)]
    made = exchange_ideas(cases, [*found[:4], None, found[5]])
    assert [r and r.idea for r in made] == ["3", "3", "5", "0", None, "2"]
    assert [r and r.span for r in made] == [(0, 1), (1, 2), (2, 3), (3, 4), None, (5, 6)]
    assert exchange_ideas(cases[:2], found[:2]) == [None, None]  # nobody to exchange with


def test_the_teacher_reads_the_idea_alone_or_a_peer_that_is_not_the_rollout(encoder: PromptEncoder):
    right, wrong = RIGHT["sum"], WRONG["sum"]
    of = group(encoder, SUM, right, wrong, right + " ")
    (of,), _ = ExactReflector().reflect([of], context(Scripted(encoder, lambda *_: ""), TRUTH))
    ideas = {d.rollout.text: [(t.role, t.text) for t in d.texts] for d in CorrectiveIdea().drafts(of)}
    assert ideas == {
        right: [("idea", "Calculate from left to right.")],
        wrong: [("idea", "Calculate 20-9 again.")],
        right + " ": [("idea", "Calculate from left to right.")],
    }
    peers = {d.rollout.text: [(t.role, t.text) for t in d.texts] for d in LocatedSolution().drafts(of)}
    assert peers == {
        right: [("success", right + " ")],
        wrong: [("success", right + " ")],
        right + " ": [("success", right)],
    }
    alone = group(encoder, SUM, right, wrong)
    (alone,), _ = ExactReflector().reflect([alone], context(Scripted(encoder, lambda *_: ""), TRUTH))
    assert [d.rollout.text for d in LocatedSolution().drafts(alone)] == [wrong]
    assert list(CorrectiveIdea().drafts(group(encoder, SUM, right, wrong))) == []


@pytest.mark.parametrize(
    ("kind", "answer", "idea", "redacted"),
    [
        ("math", "11", "The answer is 11.", "The answer is ___."),
        ("math", "11", "11, not 111 or 11.5 or x11", "___, not 111 or 11.5 or x11"),
        ("math", "\\frac{1}{2}", "Halve: \\frac{1}{2}!", "Halve: ___!"),
        (
            "mcq",
            "A",
            "A protein folds; choose option A, that is (A) or A: 0.8",
            "A protein folds; choose ___, that is ___ or ___: 0.8",
        ),
        ("mcq", "B", "Both are wrong.", None),
        ("mcq", "C", "The answer is C.", "The ___."),
    ],
)
def test_an_answer_given_away_is_seen_and_blotted_out(kind: str, answer: str, idea: str, redacted: str | None):
    problem = Problem(id="p", text="?", answer=answer, kind=kind)
    assert answer_in(problem, idea) == (redacted is not None)
    assert without_answer(problem, idea) == (redacted or idea)


def test_the_idea_is_redacted_where_that_is_asked_for(encoder: PromptEncoder):
    asked = Scripted(encoder, lambda *_: reply("20-9=12", "It is 11."))
    (made,), _ = ModelReflector(right_rollouts=False).reflect(
        [group(encoder, SUM, RIGHT["sum"], WRONG["sum"])], context(asked)
    )
    for redact, text in ((False, "It is 11."), (True, "It is ___.")):
        (draft,) = CorrectiveIdea(redact_answer=redact).drafts(made)
        assert draft.texts[0].text == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retries": -1}, r"ModelReflector.retries must be in \[0, 100\], got -1"),
        ({"min_quote": 0}, r"ModelReflector.min_quote must be in \[1, 1e6\], got 0"),
        ({"temperature": -0.1}, r"temperature must be 0 or in \[0.01, 100\], got -0.1"),
        ({"min_similarity": 0.0}, r"min_similarity must be in \(0, 1\], got 0.0"),
        ({"temperature": 0}, "set retries to 0, or a temperature"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ModelReflector(**settings)


@pytest.mark.parametrize("limits", [{"prompt_tokens": 0}, {"max_tokens": 0}])
def test_limits_that_leave_no_room(limits: dict[str, int]):
    with pytest.raises(ValueError, match="expected prompt_tokens and max_tokens of at least 1, got"):
        ReflectionLimits(**limits)
