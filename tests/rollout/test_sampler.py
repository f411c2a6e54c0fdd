from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ogls.lessons.prompts import PromptEncoder, Prompts
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.pretrained import load_tokenizer
from ogls.records import Problem, Sampling
from ogls.rollout.sampler import Sampler
from ogls.rollout.transformers import TransformersEngine
from ogls.system.step_metrics import StepMetrics
from ogls.tasks.by_kind import ByKind
from ogls.tasks.grading import GradingPool

GREEDY = Sampling(max_tokens=12, temperature=0)


def moved(folder: Path, lora: Lora | None) -> tuple[Policy, Policy]:
    """A policy as it begins, and one that has learned something."""
    start, policy = (Policy(str(folder), lora=lora, dtype="float32").load() for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(torch.randn_like(p) * 0.3)
    return start, policy


@pytest.mark.parametrize("lora", [Lora(rank=4, alpha=8), None], ids=["adapter", "full"])
def test_frozen_replies_come_from_the_weights_that_training_began_with(tiny_model: Path, lora: Lora | None):
    start, policy = moved(tiny_model, lora)
    encoder = PromptEncoder(Prompts(system=""), load_tokenizer(tiny_model))
    prompts = [encoder.student(Problem(id="p", text=text, answer="1")) for text in ("What is 1+1?", "Is 2 odd?")]

    def sampler(of: Policy, version: int) -> tuple[Sampler, TransformersEngine]:
        of.version, engine = version, TransformersEngine()
        made = Sampler(engine, of, encoder, GradingPool(ByKind()), 200)
        made.hold()
        return made, engine

    expected = sampler(start, 0)[0].replies(prompts, GREEDY, 0)
    mine, engine = sampler(policy, 3)
    assert (mine.version, engine.version) == (3, 3)
    now = mine.replies(prompts, GREEDY, 0)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    with mine.at_start(needed=True):
        assert mine.replies(prompts, GREEDY, 0) == expected != now
        assert (engine.version, mine.version, policy.version) == (0, 3, 0)
    assert (mine.version, policy.version) == (3, 3)
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())
    mine.hold()
    with mine.at_start(needed=False):
        assert mine.replies(prompts, GREEDY, 0) == now
        assert engine.version == 3


def test_at_the_start_what_an_engine_copies_is_the_folders(tiny_model: Path):
    start, policy = moved(tiny_model, Lora(rank=4, alpha=8))
    expected = dict(start.merged_weights())
    with policy.at_start():
        assert all(torch.equal(value, expected[name]) for name, value in policy.merged_weights())
    assert not all(torch.equal(value, expected[name]) for name, value in policy.merged_weights())


def test_phases_are_timed(tiny_model: Path):
    start, _ = moved(tiny_model, Lora(rank=4, alpha=8))
    encoder = PromptEncoder(Prompts(system=""), load_tokenizer(tiny_model))
    problem, metrics = Problem(id="p", text="What is 1+1?", answer="2"), StepMetrics("rollouts", 1)
    with GradingPool(ByKind()) as pool:
        sampler = Sampler(TransformersEngine(), start, encoder, pool, 200)
        sampler.hold()  # nobody records yet
        with metrics.recording():
            (group,) = sampler.rollouts([problem], [encoder.student(problem)], 2, GREEDY, 0)
            sampler.hold()  # it has these weights: nothing to do but to find that out
    first, second = group.rollouts
    assert first.completion == second.completion
    assert [phase.name for phase in metrics.phases] == ["generate", "grade", "sync"]
    assert all(a.end <= b.start for a, b in pairwise(metrics.phases))
    assert metrics.metrics() == {f"time/{phase.name}": phase.end - phase.start for phase in metrics.phases}
