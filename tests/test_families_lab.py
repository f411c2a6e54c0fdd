"""The second lab: what its student is shown, that ideas decide what it writes, and a run of it."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from ogls.lessons.privilege import PrivilegedText, ReflectionTask
from ogls.lessons.prompts import IDEA, PromptEncoder
from ogls.policy.policy import Policy
from ogls.policy.pretrained import load_tokenizer
from ogls.records import Sampling
from ogls.rollout.transformers import TransformersEngine
from ogls.tasks.by_kind import ByKind
from ogls.tasks.families import CARE, FAMILIES, Families, FamilyErrors, Task
from tests.faults.nursery import Nursery
from tests.test_cli import run_in

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments" / "lab"))
import pretrain
from family_habits import FamilyHabits, problems

LAB = pretrain.LABS["families"]


def test_an_idea_in_view_is_heeded_where_it_is_the_familys_own():
    habits, rng, right, seen = FamilyHabits(slip=0.0), random.Random(0), Counter[str](), Counter[str]()
    for problem in Families(size=900):
        idea, text = habits.after_idea(problem, rng)
        task = Task.parse(problem.text)
        kind = "own" if idea == task.idea else "care" if idea == CARE else "another"
        assert idea in {CARE, *(family.idea for family in FAMILIES.values())}
        seen[kind] += 1
        right[kind] += text == task.work()
    assert {kind: seen[kind] / 900 for kind in seen} == pytest.approx(
        {"own": 0.45, "care": 0.1, "another": 0.45}, abs=0.06
    )
    assert right["own"] == seen["own"]
    assert right["another"] / seen["another"] == pytest.approx(0.5, abs=0.1)
    assert right["care"] / seen["care"] == pytest.approx(0.5, abs=0.2)


def test_demonstrations_say_what_is_true():
    habits, rng, locator, kinds = LAB.habits, random.Random(0), FamilyErrors(), Counter[str]()
    for problem in problems(each=60):
        draft = habits.demonstrate(problem, rng)
        assert draft.demonstration is not None
        kinds[type(draft.prompt).__name__] += 1
        if isinstance(draft.prompt, ReflectionTask):
            said = json.loads(draft.demonstration)
            assert draft.prompt.correct == (locator.locate(problem, draft.prompt.attempt) is None)
            mistake = locator.mistake(problem, draft.prompt.attempt)
            expected = {"idea": locator.idea(problem)} if mistake is None else {"quote": mistake.quote}
            assert expected.items() <= said.items()
            assert mistake is None or said["idea"] == mistake.idea
        elif isinstance(draft.prompt, PrivilegedText) and draft.prompt.role == "idea":
            kinds["idea"] += 1
    assert kinds["ReflectionTask"] / 900 == pytest.approx(0.15, abs=0.05)
    assert kinds["idea"] / 900 == pytest.approx(0.4, abs=0.06)


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(LAB.prompts, load_tokenizer(LAB.student))


def test_a_problem_of_every_family_comes_back_from_tokens(encoder: PromptEncoder):
    for problem in Families(size=len(FAMILIES)):
        assert problem.solution is not None
        assert encoder.decode(encoder.student(problem)) == problem.text
        ids = encoder.completion(problem.solution)
        assert encoder.decode(ids) == problem.solution
        assert len(encoder.student(problem)) + len(ids) < 64
        assert len(ids) <= 48


def test_its_own_idea_helps_the_student_and_another_does_not(encoder: PromptEncoder):
    engine = TransformersEngine(batch_size=256)
    engine.start(LAB.student, 256)
    engine.load(Policy(str(LAB.student), dtype="float32").load(), 0)
    heldout = list(Families(size=285, split="heldout"))
    ideas = [Task.parse(problem.text).idea for problem in heldout]

    def accuracy(prompts: Sequence[Sequence[int]]) -> float:
        groups = engine.generate(prompts, Sampling(max_tokens=48), 1, seed=0)
        texts = [encoder.decode(group[0].token_ids) for group in groups]
        return sum(ByKind().grade(p, text).correct for p, text in zip(heldout, texts, strict=True)) / len(heldout)

    def with_ideas(shown: Sequence[str]) -> float:
        return accuracy([encoder.view(p, IDEA, idea) for p, idea in zip(heldout, shown, strict=True)])

    plain = accuracy([encoder.student(problem) for problem in heldout])
    assert 0.25 < plain < 0.6
    assert with_ideas(ideas) > plain + 0.15
    assert abs(with_ideas(ideas[1:] + ideas[:1]) - plain) < 0.15


@pytest.mark.parametrize("further", ["rosd_exact", "families_each"])
def test_a_run_of_the_second_lab(further: str, nursery: Nursery, tmp_path: Path):
    small = [
        *("--data.evaluation.samples", "2", "--data.problems_per_step", "16", "--data.steps_per_epoch", "2"),
        *("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.logger.init_args.run_name", "run"),
        *("--trainer.callbacks.init_args.monitor", "val/avg_at_2"),
        *(() if further == "families_each" else ("--data.val.init_args.size", "15")),
    ]
    stack = [word for name in ("families", further) for word in ("--config", f"{name}.yaml")]
    code, output = run_in(nursery, "fit", *stack, *small, cwd=tmp_path)
    assert code == 0, output[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 2
    if further == "rosd_exact":
        assert all(row["train/reflection_token_recall"] == 1 for row in steps)
        assert all(row["train/reflection_located_rate"] == 1 for row in steps)
    else:
        assert all(f"val/{name}/avg_at_2" in rows[-1] | rows[0] for name in FAMILIES)
