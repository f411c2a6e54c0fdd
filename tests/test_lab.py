"""The lab: its student reads and writes as it was taught, and a whole run of it takes seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ogls.callbacks.checkpoint_io import SoundCheckpoints
from ogls.lessons.prompts import ATTEMPT, IDEA, PromptEncoder
from ogls.policy.policy import Policy
from ogls.policy.pretrained import load_tokenizer
from ogls.records import Problem, Sampling
from ogls.rollout.transformers import TransformersEngine
from ogls.tasks.by_kind import ByKind
from ogls.tasks.chains import Chain, Chains, TerseSolutions
from tests.faults.nursery import Nursery
from tests.test_cli import run_in

LAB = Path(__file__).resolve().parents[1] / "experiments" / "lab"
sys.path.insert(0, str(LAB))
import demonstrations  # noqa: E402
import pretrain  # noqa: E402


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(pretrain.LABS["chains"].prompts, load_tokenizer(pretrain.STUDENT))


def test_every_digit_is_a_token_and_every_text_comes_back(encoder: PromptEncoder):
    problem = Problem(id="c", text="What is 20-(9-4)+7?", answer="22")
    assert len(encoder.student(problem)) == 1 + len("20-(9-4)+7?")
    texts = [
        "9-4=5\n20-5=15\n\\boxed{15}",
        '{"quote": "20-5=14", "idea": "Start with the parentheses."}',
        "Wait [...]",
    ]
    for text in texts:
        ids = encoder.completion(text)
        assert ids[-1] == encoder.end_id
        assert encoder.decode(ids) == text
        assert encoder.decode_offsets(ids[:-1])[0] == text


@pytest.mark.parametrize("lab", pretrain.LABS.values(), ids=pretrain.LABS)
def test_the_tokenizer_that_is_shipped_is_the_one_that_would_be_made(lab: pretrain.Lab):
    assert pretrain.make_tokenizer(lab).get_vocab() == load_tokenizer(lab.student).get_vocab()


def test_demonstrations_follow_from_the_seed_and_teach_completions_only(encoder: PromptEncoder):
    first, second = (
        demonstrations.Demonstrations(encoder, demonstrations.Habits(), 3, list(Chains(size=50))) for _ in range(2)
    )
    batch = next(first.batches(8, lots=2))
    assert batch == next(second.batches(8, lots=2))
    ids, targets = pretrain.padded(batch)
    for row, (prompt, completion) in enumerate(batch):
        learned = targets[row] >= 0
        assert tuple(targets[row][learned].tolist()) == completion
        assert int(learned.nonzero()[0]) == len(prompt) - 1
        assert torch.equal(ids[row, 1:][learned[:-1]], targets[row, :-1][learned[:-1]])


class Unsolved(Chains):
    def __getitem__(self, index: int) -> Problem:
        return Problem(id="q", text="", answer="")


def test_terse_solutions_are_the_last_line():
    worked = Chains(size=3)
    terse = TerseSolutions(problems=worked)
    assert len(terse) == 3
    assert [problem.solution for problem in terse] == [f"\\boxed{{{problem.answer}}}" for problem in worked]
    assert terse[1].text == worked[1].text
    with pytest.raises(ValueError, match="'q' has no solution"):
        TerseSolutions(problems=Unsolved(size=1))[0]


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    engine = TransformersEngine(batch_size=256)
    engine.start(pretrain.STUDENT, 256)
    engine.load(Policy(str(pretrain.STUDENT), dtype="float32").load(), 0)
    return engine


def test_the_student_works_in_part_and_is_a_good_teacher(encoder: PromptEncoder, engine: TransformersEngine):
    problems = list(Chains(size=128, split="heldout", parentheses=0.7))

    def accuracy(prompts: Sequence[Sequence[int]]) -> float:
        groups = engine.generate(prompts, Sampling(max_tokens=48), 1, seed=0)
        texts = [encoder.decode(group[0].token_ids) for group in groups]
        return sum(ByKind().grade(p, text).correct for p, text in zip(problems, texts, strict=True)) / len(problems)

    chains = [Chain.parse(problem.text) for problem in problems]
    assert 0.35 < accuracy([encoder.student(problem) for problem in problems]) < 0.65
    assert accuracy([encoder.view(p, ATTEMPT, c.work()) for p, c in zip(problems, chains, strict=True)]) > 0.9
    assert accuracy([encoder.view(p, IDEA, c.idea) for p, c in zip(problems, chains, strict=True)]) > 0.75


def test_a_run_of_the_lab(nursery: Nursery, tmp_path: Path):
    small = [
        *("--data.val.size", "16", "--data.evaluation.samples", "2", "--data.problems_per_step", "8"),
        *("--data.steps_per_epoch", "2", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
        *("--trainer.callbacks.init_args.monitor", "val/avg_at_2"),
    ]
    stack = [word for name in ("lab", "opsd", "plain_kl") for word in ("--config", f"{name}.yaml")]
    code, output = run_in(nursery, "fit", *stack, *small, cwd=tmp_path)
    assert code == 0, output[-3000:]
    (metrics,) = tmp_path.glob("runs/OPSD-objective.temperature-1-*-s0-*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    drift = {row["step"]: row["val/kl_to_base"] for row in rows if "val/kl_to_base" in row}
    assert drift[0] == 0.0
    assert drift[2] > 0.0
    saved = SoundCheckpoints().load_checkpoint(metrics.parent / "checkpoints" / "best.ckpt")["state_dict"]
    stored = AutoModelForCausalLM.from_pretrained(metrics.parent / "best_model").state_dict()
    assert all(torch.equal(stored[name.removeprefix("policy.")], weight) for name, weight in saved.items())
    assert len(load_tokenizer(metrics.parent / "best_model")) == len(load_tokenizer(pretrain.STUDENT))
    assert "| avg_at_2 | " in (metrics.parent / "best_model" / "README.md").read_text()
    assert max(row["train/engine_logprob_gap"] for row in rows if "train/loss" in row) < 1e-4
