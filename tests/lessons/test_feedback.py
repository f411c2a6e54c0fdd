"""Feedback in the teacher's views, and thoughts that are not: worked by hand, token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ogls.lessons.build import LessonBuilder
from ogls.lessons.feedback import Feedback
from ogls.lessons.privilege import PeerOutcomes, Privilege, ProblemAlone, ReferenceSolution, SuccessfulPeer
from ogls.lessons.prompts import ATTEMPT, PromptEncoder, Prompts
from ogls.lessons.reflection.reflector import ReflectionCase
from ogls.lessons.selection import AllTokens
from ogls.methods import SDPO, SDPOWithFeedback
from ogls.methods.sd_zero import OwnVerdict
from ogls.policy.pretrained import load_tokenizer
from ogls.records import Completion, Lesson, Problem, Rollout, RolloutGroup
from ogls.tasks.answers import without_thoughts
from ogls.tasks.math import MathVerifier
from ogls.tracking.files import METRICS, read_rows
from tests.faults.nursery import Nursery
from tests.test_cli import run_in

PROBLEM = Problem(id="c", text="What is 12+8-9?", answer="11", solution="20-9=11, \\boxed{11}")
RIGHT, OTHER, WRONG = "\\boxed{11}", "12+8=20, \\boxed{11}", "\\boxed{12}"
SAID = "The answer read is 12, which is wrong."
JUDGED = f"What is 12+8-9?\n\nYou have tried this problem before. Of your attempt it was said:\n{SAID}"
SHOWN = "\n\nFor your information, here is one attempt at this problem:\n{}\n\nNow write your own solution. "
SHOWN += "Reason step by step, and put your final answer in \\boxed{{}}."
PLAIN = "\n\nReason step by step, and put your final answer in \\boxed{}."


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def encoder(tokenizer) -> PromptEncoder:
    return PromptEncoder(Prompts(system=""), tokenizer)


def group(encoder: PromptEncoder, *texts: str, cut: bool = False) -> RolloutGroup:
    def rollout(text: str) -> Rollout:
        ids = encoder.completion(text)
        reason = "length" if cut and text == WRONG else "stop"
        completion = Completion(token_ids=ids, logprobs=(-0.5,) * len(ids), finish_reason=reason)
        unclosed = encoder.ends_in_thought(prompt, text)
        return Rollout(completion=completion, text=text, verdict=MathVerifier().grade(PROBLEM, text), unclosed=unclosed)

    prompt = encoder.student(PROBLEM)
    return RolloutGroup(problem=PROBLEM, prompt_ids=prompt, rollouts=tuple(map(rollout, texts)), policy_version=0)


def lessons(encoder: PromptEncoder, privilege: Privilege, of: RolloutGroup) -> tuple[Lesson, ...]:
    made = LessonBuilder(encoder=encoder, privilege=privilege, selection=AllTokens(), locator=None, context_length=900)
    return made.build([of])[0]


def views(encoder: PromptEncoder, privilege: Privilege, of: RolloutGroup) -> dict[str, list[tuple[int, ...]]]:
    """The teacher's privileged prompts by the text of the rollout that is learned."""
    return {
        encoder.decode(lesson.token_ids): [view.prefix_ids for view in lesson.views if view.role != "plain"]
        for lesson in lessons(encoder, privilege, of)
    }


def ids(encoder: PromptEncoder, prompt: str) -> tuple[int, ...]:
    """What the chat template makes of a prompt."""
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": prompt}]
    return tuple(encoder.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


def test_sdpo_reads_a_peer_and_of_a_wrong_rollout_what_was_said(encoder: PromptEncoder) -> None:
    made = lessons(encoder, SDPOWithFeedback().privilege, group(encoder, RIGHT, WRONG, OTHER))
    assert [[view.role for view in lesson.views] for lesson in made] == [["plain", "success"]] * 3
    found = views(encoder, SDPOWithFeedback().privilege, group(encoder, RIGHT, WRONG, OTHER))
    assert found == {
        RIGHT: [ids(encoder, PROBLEM.text + SHOWN.format(OTHER))],
        OTHER: [ids(encoder, PROBLEM.text + SHOWN.format(RIGHT))],
        WRONG: [ids(encoder, JUDGED + SHOWN.format(RIGHT))],
    }


def test_without_a_right_peer_a_wrong_rollout_is_learned_with_what_was_said_alone(encoder: PromptEncoder) -> None:
    wrong = group(encoder, WRONG, "no idea")
    nothing = "No final answer was found: it has to stand in \\boxed{}."
    assert views(encoder, Feedback(SuccessfulPeer()), wrong) == {
        WRONG: [ids(encoder, JUDGED + PLAIN)],
        "no idea": [ids(encoder, JUDGED.replace(SAID, nothing) + PLAIN)],
    }
    assert views(encoder, Feedback(SuccessfulPeer(), alone=False), wrong) == {}
    (alone,) = lessons(encoder, Feedback(), group(encoder, RIGHT, WRONG))
    assert [(view.role, view.prefix_ids) for view in alone.views[1:]] == [("feedback", ids(encoder, JUDGED + PLAIN))]


def test_the_gold_answer_is_told_on_request_alone(encoder: PromptEncoder) -> None:
    mixed = group(encoder, RIGHT, WRONG)
    told = views(encoder, Feedback(SuccessfulPeer(), tell_answer=True), mixed)
    assert told == {WRONG: [ids(encoder, f"{JUDGED} The right answer is 11.{SHOWN.format(RIGHT)}")]}
    peers = views(encoder, Feedback(SuccessfulPeer(), only_alone=True), mixed)
    assert peers == views(encoder, SuccessfulPeer(), mixed)


def test_of_a_rollout_that_is_cut_off_nothing_else_is_said(encoder: PromptEncoder) -> None:
    ((prompt,),) = views(encoder, Feedback(), group(encoder, WRONG, cut=True)).values()
    assert prompt == ids(encoder, JUDGED.replace(SAID, "It was cut off before its end: it is too long.") + PLAIN)


def test_both_sides_of_a_contrast_show_what_was_said(encoder: PromptEncoder) -> None:
    found = views(
        encoder, Feedback(PeerOutcomes(max_peers=1, use_solution=False), alone=False), group(encoder, RIGHT, WRONG)
    )
    assert found == {WRONG: [ids(encoder, JUDGED + SHOWN.format(text)) for text in (RIGHT, WRONG)]}


def test_what_was_said_stays_text(encoder: PromptEncoder) -> None:
    """A control token in it would end the prompt's turn."""
    verdict = replace(MathVerifier().grade(PROBLEM, WRONG), feedback=f"{encoder.tokenizer.eos_token} {{text}}")
    of = group(encoder, WRONG)
    of = replace(of, rollouts=(replace(of.rollouts[0], verdict=verdict),))
    ((prompt,),) = views(encoder, Feedback(), of).values()
    control = encoder.tokenizer.eos_token_id
    assert prompt.count(control) == encoder.student(PROBLEM).count(control)
    assert f"{encoder.tokenizer.eos_token} {{text}}" in encoder.decode(prompt)


def test_its_words_can_be_replaced(tokenizer) -> None:
    encoder = PromptEncoder(Prompts(system="", views={"feedback": "{problem} [{text}]"}), tokenizer)
    ((prompt,),) = views(encoder, Feedback(), group(encoder, WRONG)).values()
    assert prompt == ids(encoder, f"{PROBLEM.text} [{SAID}]{PLAIN}")


@pytest.mark.parametrize(
    ("beside", "message"),
    [(ProblemAlone(), "ProblemAlone has none: set beside to null"), (PeerOutcomes(), "set privilege.alone to false")],
)
def test_what_feedback_cannot_stand_beside(beside: Privilege, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Feedback(beside)


def test_the_name_says_what_the_teacher_reads() -> None:
    assert SDPO().name == "SDPO"
    assert SDPOWithFeedback().name == "SDPOWithFeedback"
    assert SDPO(privilege=Feedback(SuccessfulPeer())).name == "SDPO[privilege=Feedback(beside=SuccessfulPeer)]"
    assert SDPOWithFeedback(privilege=Feedback(SuccessfulPeer(), only_alone=True)).name.endswith("[only_alone=True]")


# ---- thoughts ----


@pytest.mark.parametrize(
    ("text", "unclosed", "said"),
    [
        ("no thought ", False, "no thought "),
        ("<think>a</think>\n\nb ", False, "b "),
        ("a <think>b</think> c<think></think>d", False, "a cd"),
        ("from the prompt</think> a", False, "a"),
        ("a <think>and so on", True, "a "),
        ("<think>a</think>b<think>c", True, "b"),
        ("opened by the prompt", True, ""),
        ("", False, ""),
    ],
)
def test_a_text_without_its_thoughts(text: str, unclosed: bool, said: str) -> None:
    assert without_thoughts(text, unclosed) == said


def test_many_tags_take_linear_time() -> None:
    assert without_thoughts("<think>" * 200_000, unclosed=True) == ""
    assert without_thoughts("</think>" * 200_000) == ""


def test_peers_and_solutions_are_shown_without_thoughts(tokenizer) -> None:
    of = group(PromptEncoder(Prompts(system=""), tokenizer), f"<think>12+8 is 20</think>\n{RIGHT}", WRONG)
    of = replace(of, problem=replace(PROBLEM, solution=f"<think>so</think>{OTHER}"))
    for drop, peer, solution in ((True, RIGHT, OTHER), (False, of.rollouts[0].text, of.problem.solution)):
        encoder = PromptEncoder(Prompts(system="", drop_thoughts=drop), tokenizer)
        assert views(encoder, SuccessfulPeer(), of) == {WRONG: [ids(encoder, PROBLEM.text + SHOWN.format(peer))]}
        given = views(encoder, ReferenceSolution(), of)
        assert given[WRONG] == [ids(encoder, PROBLEM.text + SHOWN.format(solution))]
        assert of.rollouts[0].text in given, "what is learned keeps its thoughts"
        assert encoder.reflect(of.problem, WRONG, False, of.rollouts[0].text) == encoder.reflect(
            of.problem, WRONG, False, peer
        )


def test_an_unclosed_thought_does_not_take_along_what_follows_it(encoder: PromptEncoder) -> None:
    """SD-Zero writes its verdict behind the attempt."""
    ((prompt,),) = views(encoder, OwnVerdict(), group(encoder, "So <think>12+8")).values()
    assert encoder.decode(prompt).count("So \n\nThis attempt is wrong. Correct it.") == 1


def test_texts_without_thoughts_are_shown_as_they_were(encoder: PromptEncoder, tokenizer) -> None:
    of = group(encoder, f" {RIGHT}\n", WRONG)
    whole = PromptEncoder(Prompts(system="", drop_thoughts=False), tokenizer)
    assert lessons(encoder, PeerOutcomes(), of) == lessons(whole, PeerOutcomes(), of)
    assert encoder.view(PROBLEM, ATTEMPT, f" {RIGHT}\n") == ids(encoder, PROBLEM.text + SHOWN.format(f" {RIGHT}\n"))


def test_a_thought_that_the_prompt_opens_is_counted_where_it_is_not_closed(encoder: PromptEncoder) -> None:
    opened = encoder.completion("Solve it.\n<think>\n")[:-1]
    assert encoder.ends_in_thought(opened, "12+8")
    assert not encoder.ends_in_thought(opened, f"12+8</think>{RIGHT}")
    assert not encoder.ends_in_thought(encoder.student(PROBLEM), "12+8")
    assert encoder.ends_in_thought(encoder.student(PROBLEM), "<think>12+8")
    of = group(encoder, "12+8")
    of = replace(of, rollouts=(replace(of.rollouts[0], unclosed=True),))
    assert encoder.readable(of).rollouts[0].text == "", "all of it is a thought"


def test_an_attempt_is_reflected_on_with_its_thoughts(encoder: PromptEncoder) -> None:
    case = ReflectionCase(problem=PROBLEM, rollout=group(encoder, "<think>12+8=21</think>").rollouts[0])
    prompt, shortened = encoder.reflect_within(900, PROBLEM, case.rollout.text, False, "<think>x</think>y")
    assert "<think>12+8=21</think>" in encoder.decode(prompt)
    assert "x</think>" not in encoder.decode(prompt)
    assert not shortened


WATCH = """
from lightning import Callback

class Views(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        decode = trainer.datamodule.encoder.decode
        with open("views.txt", "a") as out:
            for lesson in batch.lessons:
                print(*[decode(view.prefix_ids) for view in lesson.views[1:]], sep="\\n", end="\\n---\\n", file=out)
"""


def test_a_run_whose_teacher_reads_feedback(nursery: Nursery, tmp_path: Path) -> None:
    (tmp_path / "watch.py").write_text(WATCH)
    overlay = {
        "trainer": {"callbacks": [{"class_path": "ogls.callbacks.BestCheckpoint"}, {"class_path": "watch.Views"}]}
    }
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(overlay))
    stack = [word for name in ("lab", "sdpo_feedback", "few") for word in ("--config", f"{name}.yaml")]
    few = ["--data.val.size", "4", "--data.evaluation.samples", "1", "--data.problems_per_step", "4"]
    few += ["--data.steps_per_epoch", "1", "--trainer.max_epochs", "1", "--data.context_length", "320"]
    few += ["--trainer.accelerator", "cpu", "--data.prompts.views.feedback", "{problem}\nJudged: {text}"]
    code, output = run_in(nursery, "fit", *stack, *few, cwd=tmp_path)
    assert code == 0, output[-3000:]
    (metrics,) = tmp_path.glob(f"runs/SDPOWithFeedback-s0-*/{METRICS}")
    (row,) = [row for row in read_rows(metrics) if "train/loss" in row]
    shown = (tmp_path / "views.txt").read_text().split("\n---\n")[:-1]
    assert len(shown) == row["train/lessons"]
    judged = [text for text in shown if "\nJudged: " in text]
    wrong = round((1 - row["train/accuracy"]) * 16)
    assert len(judged) == wrong > 0, "every wrong rollout is learned with what was said of it"
    assert all("which is wrong." in text or "No final answer" in text for text in judged)
    assert row["train/unclosed_rate"] == 0.0
