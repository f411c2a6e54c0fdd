"""The third lab: what its student is shown, that the chat template decides whether it thinks, and a run of it."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from ogls.lessons.privilege import ReflectionTask
from ogls.lessons.prompts import ATTEMPT, PromptEncoder
from ogls.policy.policy import Policy
from ogls.policy.pretrained import load_tokenizer
from ogls.records import Problem, Sampling
from ogls.rollout.transformers import TransformersEngine
from ogls.tasks.by_kind import ByKind
from ogls.tasks.chains import Chain, Chains
from tests.faults.nursery import Nursery
from tests.test_cli import run_in

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS / "lab")]
import pretrain  # noqa: E402
from demonstrations import Demonstrations, terse  # noqa: E402
from lab.direct import Direct  # noqa: E402
from thinking_habits import WAIT, ThinkingHabits  # noqa: E402

LAB = pretrain.LABS["thinking"]
HELDOUT = Chains(size=128, split="heldout", parentheses=0.7)


def test_a_wrong_thought_of_its_own_is_mostly_noticed_and_one_that_follows_a_text_never():
    habits, rng, seen = ThinkingHabits(), random.Random(0), Counter[str]()
    for problem in Chains(size=3000, parentheses=0.7):
        draft = habits.demonstrate(problem, rng)
        assert draft.demonstration is not None
        if not draft.demonstration.startswith("<think>"):
            seen["direct"] += 1
            assert "think>" not in draft.demonstration
            continue
        assert not isinstance(draft.prompt, ReflectionTask)
        thought, _, answer = draft.demonstration.removeprefix("<think>").partition("</think>")
        first, waited, again = thought.partition(WAIT)
        right = Chain.parse(problem.text).work()
        if draft.prompt is not None:
            kind = "shown"
            assert not waited
        elif terse(first) == terse(right):
            kind = "right"
            assert not waited
        else:
            kind = "noticed" if waited else "missed"
        assert answer == (again or first)
        assert not waited or again == right
        seen[kind] += 1
    own = seen["noticed"] + seen["missed"]
    assert own > 200
    assert seen["noticed"] / own == pytest.approx(0.7, abs=0.06)
    assert seen["direct"] / 3000 == pytest.approx(0.15 + 0.85 / 2, abs=0.03)  # reflections never think


@pytest.fixture(scope="module")
def encoders() -> dict[bool, PromptEncoder]:
    tokenizer = load_tokenizer(LAB.student)
    assert LAB.thinking is not None
    return {thinks: PromptEncoder(p, tokenizer) for thinks, p in ((False, LAB.prompts), (True, LAB.thinking))}


def test_a_prompt_of_the_student_that_does_not_think_ends_with_an_empty_thought(encoders: dict[bool, PromptEncoder]):
    problem = Problem(id="c", text="What is 20-(9-4)+7?", answer="22")
    begin, end = encoders[True].tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert encoders[False].student(problem) == (*encoders[True].student(problem), begin, end)
    assert encoders[False].view(problem, ATTEMPT, "x") == (*encoders[True].view(problem, ATTEMPT, "x"), begin, end)
    (direct,) = Direct(problems=Single(size=1))
    assert encoders[True].student(direct) == encoders[False].student(problem)
    demonstrations = Demonstrations(encoders[False], LAB.habits, 0, HELDOUT, encoders[True])
    for prompt, completion in (demonstrations.draw() for _ in range(200)):
        assert (completion[0] == begin) == (prompt[-2:] != (begin, end))


class Single(Chains):
    def __getitem__(self, index: int) -> Problem:
        if index:
            raise IndexError
        return Problem(id="c", text="What is 20-(9-4)+7?", answer="22")


def test_the_student_thinks_where_the_template_lets_it_and_is_right_more_often(encoders: dict[bool, PromptEncoder]):
    engine = TransformersEngine(batch_size=256)
    engine.start(LAB.student, 384)
    engine.load(Policy(str(LAB.student), dtype="float32").load(), 0)

    def texts(thinks: bool, prompts: Sequence[Sequence[int]]) -> list[str]:
        groups = engine.generate(prompts, Sampling(max_tokens=128), 1, seed=0)
        said = [encoders[thinks].decode(group[0].token_ids) for group in groups]
        assert sum(text.startswith("<think>") == thinks for text in said) > 0.98 * len(said)
        return said

    verifier = ByKind()

    def accuracy(said: Sequence[str]) -> float:
        return sum(verifier.grade(p, text).correct for p, text in zip(HELDOUT, said, strict=True)) / len(said)

    plain, shown = {}, {}
    for thinks, encoder in encoders.items():
        plain[thinks] = accuracy(texts(thinks, [encoder.student(problem) for problem in HELDOUT]))
        works = [Chain.parse(problem.text).work() for problem in HELDOUT]
        views = [encoder.view(problem, ATTEMPT, work) for problem, work in zip(HELDOUT, works, strict=True)]
        shown[thinks] = accuracy(texts(thinks, views))
    assert 0.35 < plain[False] < 0.65
    assert plain[True] > plain[False] + 0.05  # of 512 problems 0.645 and 0.492
    assert min(shown.values()) > 0.9


def test_a_run_of_the_third_lab_is_judged_in_both_modes(nursery: Nursery, tmp_path: Path):
    small = [
        *("--data.evaluation.samples", "2", "--data.problems_per_step", "8", "--data.steps_per_epoch", "2"),
        *("--data.val.thinking.init_args.size", "16", "--data.val.direct.init_args.problems.init_args.size", "16"),
        *("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.logger.init_args.run_name", "run"),
    ]
    stack = [word for name in ("lab", "lab_thinking", "opsd") for word in ("--config", f"{name}.yaml")]
    code, output = run_in(nursery, "fit", *stack, *small, cwd=tmp_path)
    assert code == 0, output[-3000:]
    folder = tmp_path / "runs" / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before = rows[0]
    assert before["val/thinking/length_mean"] > 1.5 * before["val/direct/length_mean"]
    assert max(row["train/length_mean"] for row in rows if "train/loss" in row) < 40  # 20 tokens, and no thoughts
