from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from ogls.lessons.advantage import GroupRelative
from ogls.lessons.build import LessonBuilder
from ogls.lessons.privilege import (
    Demonstration,
    LessonDraft,
    PeerOutcomes,
    Privilege,
    PrivilegedText,
    ShortSuccesses,
    Unprivileged,
)
from ogls.lessons.prompts import ATTEMPT, PromptEncoder, Prompts, Wording
from ogls.lessons.reflection.privilege import CorrectiveIdea
from ogls.lessons.selection import AllTokens, DecayFromError, TokenSelection, UpToError
from ogls.loss.steering import Unsteered
from ogls.methods import Method
from ogls.policy.pretrained import load_tokenizer
from ogls.records import Completion, Problem, Reflection, Role, Rollout, RolloutGroup, Span, Verdict
from ogls.tasks.chains import ChainErrors

PROBLEM = Problem(id="c", text="What is 12+8-9?", answer="11", solution="12+8=20\n20-9=11\n\\boxed{11}")
WRONG = "12+8=20\n20-9=12\n\\boxed{12}"


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> PromptEncoder:
    return PromptEncoder(Prompts(system=""), load_tokenizer(tiny_model))


def builder(encoder: PromptEncoder, selection: TokenSelection, length: int = 500, **parts) -> LessonBuilder:
    privilege: Privilege = parts.get("privilege", PeerOutcomes())
    return LessonBuilder(
        encoder=encoder, privilege=privilege, selection=selection, locator=ChainErrors(), context_length=length
    )


def group(encoder: PromptEncoder, *texts: str, finish_reason: str = "stop") -> RolloutGroup:
    rollouts = []
    for text in texts:
        ids = encoder.completion(text)
        completion = Completion(token_ids=ids, logprobs=(-0.5,) * len(ids), finish_reason=finish_reason)
        correct = text == PROBLEM.solution
        rollouts.append(Rollout(completion=completion, text=text, verdict=Verdict(correct=correct, status="graded")))
    return RolloutGroup(
        problem=PROBLEM, prompt_ids=encoder.student(PROBLEM), rollouts=tuple(rollouts), policy_version=0
    )


def test_a_wrong_rollout_is_learned_up_to_its_error_under_three_views(encoder: PromptEncoder):
    (lesson,), counts = builder(encoder, UpToError()).build([group(encoder, PROBLEM.solution, WRONG)])
    learned = [t for t, w in zip(lesson.token_ids, lesson.token_weights, strict=True) if w]
    assert encoder.decode(learned) == "12+8=20\n20-9=12"
    assert lesson.num_learned == len(learned)
    assert [view.role for view in lesson.views] == ["plain", "success", "success", "failure"]
    assert lesson.views[0].prefix_ids == lesson.prompt_ids == encoder.student(PROBLEM)
    assert lesson.views[3].prefix_ids == encoder.view(PROBLEM, ATTEMPT, WRONG)
    assert counts["lessons"] == 1
    assert counts["tokens_learned"] == len(learned)


def test_a_rollout_whose_error_is_nowhere_to_be_found_is_dropped_and_counted(encoder: PromptEncoder):
    lessons, counts = builder(encoder, UpToError()).build([group(encoder, "I cannot say.", WRONG)])
    assert len(lessons) == 1
    assert counts["dropped_unlocated"] == 1


def test_the_token_ids_are_those_that_were_sampled(encoder: PromptEncoder):
    odd = group(encoder, WRONG)
    one_by_one = tuple(i for character in WRONG for i in encoder.completion(character)[:-1])
    completion = Completion(token_ids=one_by_one, logprobs=(-1.0,) * len(one_by_one), finish_reason="length")
    rollout = Rollout(completion=completion, text=WRONG, verdict=Verdict(correct=False, status="graded"))
    odd = RolloutGroup(problem=PROBLEM, prompt_ids=odd.prompt_ids, rollouts=(rollout,), policy_version=0)
    (lesson,), _ = builder(encoder, AllTokens()).build([odd])
    assert lesson.token_ids == one_by_one


@pytest.mark.fault("malformed data, over-long prompts and views")
def test_a_view_that_does_not_fit_is_dropped_and_counted_never_cut(encoder: PromptEncoder):
    of = group(encoder, PROBLEM.solution, WRONG)
    longest = max(len(encoder.view(PROBLEM, ATTEMPT, text)) for text in (PROBLEM.solution, WRONG))
    fits = longest + len(encoder.completion(WRONG))
    lessons, counts = builder(encoder, AllTokens(), length=fits).build([of])
    assert len(lessons) == 1
    assert counts["dropped_view_too_long"] == 0
    lessons, counts = builder(encoder, AllTokens(), length=fits - 1).build([of])
    assert lessons == ()
    assert counts["dropped_view_too_long"] == 1, "a rollout, whatever the number of its views"
    assert counts["views_too_long"] > 0


def test_a_demonstration_is_learned_whole_with_its_end_token(encoder: PromptEncoder):
    of = RolloutGroup(problem=PROBLEM, prompt_ids=(1, 2), rollouts=(), policy_version=0)
    (lesson,), _ = builder(encoder, AllTokens(), privilege=Demonstration()).build([of])
    assert lesson.token_ids == encoder.completion(PROBLEM.solution)
    assert lesson.token_ids[-1] == encoder.end_id
    assert set(lesson.token_weights) == {1.0}
    assert lesson.logprobs is None
    assert lesson.views == ()


def test_a_demonstration_that_does_not_fit_is_counted(encoder: PromptEncoder):
    of = RolloutGroup(problem=PROBLEM, prompt_ids=(1, 2), rollouts=(), policy_version=0)
    lessons, counts = builder(encoder, AllTokens(), length=3, privilege=Demonstration()).build([of])
    assert lessons == ()
    assert counts["dropped_prompt_too_long"] == 1


def test_a_quote_that_was_not_found_is_no_lesson_whatever_the_selection(encoder: PromptEncoder):
    of = group(encoder, WRONG, PROBLEM.solution)
    wrong, right = (
        replace(rollout, reflection=Reflection(idea="Left to right.", quote=quote))
        for rollout, quote in zip(of.rollouts, ("nowhere", None), strict=True)
    )
    made = builder(encoder, AllTokens(), privilege=CorrectiveIdea())
    lessons, counts = replace(made, reflected=True).build([replace(of, rollouts=(wrong, right))])
    assert [lesson.token_ids for lesson in lessons] == [right.completion.token_ids]
    assert counts["dropped_unlocated"] == 1


def test_all_rollouts_of_a_mixed_group_are_reinforced_and_the_wrong_ones_also_distilled(encoder: PromptEncoder):
    of = group(encoder, PROBLEM.solution, WRONG)
    build = replace(builder(encoder, UpToError()), advantage=GroupRelative())
    (wrong, right), counts = build.build([of])
    assert (wrong.advantage, right.advantage) == (-1.0, 1.0)
    assert wrong.views
    assert right.views == ()
    assert right.token_ids == of.rollouts[0].completion.token_ids
    assert not any(right.token_weights)
    assert wrong.num_weighted < wrong.num_learned == len(wrong.token_ids)
    assert right.num_learned == len(right.token_ids)
    assert counts["rollouts_reinforced"] == 2
    assert counts["tokens_learned"] == len(right.token_ids) + len(wrong.token_ids), "those without a weight, too"


def test_routed_a_rollout_is_either_distilled_or_reinforced(encoder: PromptEncoder):
    of = group(encoder, PROBLEM.solution, WRONG, "I cannot say.")
    build = replace(builder(encoder, UpToError()), advantage=GroupRelative(routed=True))
    lessons, counts = build.build([of])
    assert counts["dropped_unlocated"] == 1
    assert [(bool(lesson.views), lesson.advantage > 0, lesson.advantage < 0) for lesson in lessons] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),  # whose error could not be found
    ]


def test_a_group_without_contrast_is_not_reinforced(encoder: PromptEncoder):
    build = replace(builder(encoder, AllTokens(), privilege=Unprivileged()), advantage=GroupRelative())
    assert build.build([group(encoder, WRONG, WRONG)])[0] == ()
    lessons, _ = build.build([group(encoder, WRONG, PROBLEM.solution)])
    assert [lesson.advantage for lesson in lessons] == [-1.0, 1.0]


def test_a_short_success_is_learned_at_its_end_whatever_the_selection_of_the_run(encoder: PromptEncoder):
    longer = "I cannot say, not even if I think about it for quite a while."
    of = group(encoder, PROBLEM.solution, longer, f"{longer} {longer}")
    (short,), _ = builder(encoder, UpToError(), privilege=ShortSuccesses(count=3)).build([of])
    assert short.token_ids == of.rollouts[0].completion.token_ids
    assert short.token_weights == (0.0,) * (len(short.token_ids) - 3) + (1.0,) * 3


@dataclass(frozen=True)
class Heavier(Privilege):
    """Wrong rollouts at a quarter, right ones three times, the reference solution twice; nobody reads anything."""

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for rollout in group.rollouts:
            yield LessonDraft(rollout=rollout, weight=3.0 if rollout.correct else 0.25)
        yield LessonDraft(demonstration=group.problem.solution, weight=2.0)


def test_the_weight_of_a_draft_multiplies_its_token_weights(encoder: PromptEncoder):
    of, selection = group(encoder, PROBLEM.solution, WRONG), DecayFromError(half_life=4.0)
    (right, wrong, written), counts = builder(encoder, selection, privilege=Heavier()).build([of])
    assert right.token_weights == (3.0,) * len(right.token_ids)
    assert written.token_weights == (2.0,) * len(written.token_ids)
    error = len(encoder.completion("12+8=20\n20-9=")) - 1  # the next token is the wrong number
    of_error = [0.0] * error + [0.25 * 2 ** (-t / 4) for t in range(len(wrong.token_ids) - error)]
    assert wrong.token_weights == pytest.approx(of_error)
    assert counts["tokens_learned"] == len(right.token_ids) + len(written.token_ids) + len(wrong.token_ids) - error


def test_a_draft_of_weight_zero_is_no_lesson(encoder: PromptEncoder):
    @dataclass(frozen=True)
    class Weightless(Privilege):
        def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
            yield LessonDraft(rollout=group.rollouts[0], weight=0.0)

    made = builder(encoder, AllTokens(), privilege=Weightless())
    assert made.build([group(encoder, WRONG)])[0] == ()


HINT = Wording("hint", "{problem}\nA hint: {text}")


@dataclass(frozen=True)
class AnswerAsHint(Privilege):
    """A way to read of one's own, in one class: its own role, and its own words."""

    views: ClassVar[Mapping[Role, Wording]] = {"answer": HINT}

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        for rollout in group.failures:
            text = PrivilegedText(role="answer", text=f"it is {group.problem.answer}")
            yield LessonDraft(rollout=rollout, texts=(text,))


def test_a_privilege_brings_its_role_and_its_words_along(encoder: PromptEncoder):
    of = group(encoder, PROBLEM.solution, WRONG)
    (lesson,), _ = builder(encoder, AllTokens(), privilege=AnswerAsHint()).build([of])
    assert [view.role for view in lesson.views] == ["plain", "answer"]
    assert lesson.views[1].prefix_ids == encoder.view(PROBLEM, HINT, "it is 11")
    assert "What is 12+8-9?\nA hint: it is 11<|im_end|>" in encoder.tokenizer.decode(lesson.views[1].prefix_ids)
    method = Method(privilege=AnswerAsHint())
    assert method.views == {"answer": HINT}
    assert Unsteered().coefficients([view.role for view in lesson.views]) == ((0.0, 1.0), (0.0, 0.0))


def test_the_prompts_word_the_view_of_a_privilege_otherwise(tiny_model: Path):
    prompts = Prompts(system="", views={"hint": "{text}, you know. {problem}"})
    encoder = PromptEncoder(prompts, load_tokenizer(tiny_model))
    (lesson,), _ = builder(encoder, AllTokens(), privilege=AnswerAsHint()).build([group(encoder, WRONG)])
    text = encoder.tokenizer.decode(lesson.views[1].prefix_ids)
    assert "it is 11, you know. What is 12+8-9?<|im_end|>" in text
    assert "A hint" not in text


class Unlikely(TokenSelection):
    """The tokens of a wrong rollout that the sampler found unlikely, and every token of a right one."""

    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        assert error is None
        return tuple(float(rollout.correct or logprob < -1) for logprob in rollout.completion.logprobs)


def test_a_selection_sees_the_whole_rollout(encoder: PromptEncoder):
    of = group(encoder, PROBLEM.solution, WRONG)
    right, wrong = of.rollouts
    logprobs = tuple(-2.0 if t % 3 == 0 else -0.5 for t in range(len(wrong.completion.token_ids)))
    wrong = replace(wrong, completion=replace(wrong.completion, logprobs=logprobs))
    made = builder(encoder, Unlikely(), privilege=PeerOutcomes(learn_successes=True))
    lessons, _ = made.build([replace(of, rollouts=(right, wrong))])
    assert [lesson.token_weights for lesson in lessons] == [
        (1.0,) * len(right.completion.token_ids),
        tuple(float(t % 3 == 0) for t in range(len(logprobs))),
    ]
