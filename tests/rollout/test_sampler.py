from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    start, policy = Policy(folder, lora=lora, dtype="float32"), Policy(folder, lora=lora, dtype="float32")
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
        module: Any = SimpleNamespace(policy=of, policy_version=version, folder=of.path)
        engine = TransformersEngine()
        made = Sampler(engine, module, encoder, GradingPool(ByKind()), 200)
        made.hold(version)
        return made, engine

    expected = sampler(start, 0)[0].replies(prompts, GREEDY, 0, frozen=False)
    mine, engine = sampler(policy, 3)
    now = mine.replies(prompts, GREEDY, 0, frozen=False)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    assert mine.replies(prompts, GREEDY, 0, frozen=True) == expected != now
    assert engine.version == 0
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())
    assert mine.replies(prompts, GREEDY, 0, frozen=False) == now
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
    module: Any = SimpleNamespace(policy=start, policy_version=0, folder=tiny_model)
    problem, meter = Problem(id="p", text="What is 1+1?", answer="2"), StepMetrics("rollouts", 1)
    with GradingPool(ByKind()) as pool:
        sampler = Sampler(TransformersEngine(), module, encoder, pool, 200)
        sampler.hold(0)
        (group,) = sampler.rollouts([problem], [encoder.student(problem)], 2, GREEDY, 0, meter)
    first, second = group.rollouts
    assert first.completion == second.completion
    assert [interval.phase for interval in meter.intervals] == ["generate", "grade"]
    assert all(a.end <= b.start for a, b in zip(meter.intervals, meter.intervals[1:], strict=False))
    lengths = {f"time/{interval.phase}": interval.end - interval.start for interval in meter.intervals}
    assert meter.metrics() == lengths
