"""What the guard makes of an engine that fails: once, twice, or without a word."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.records import Sampling
from ogls.rollout.guard import EngineGuard
from ogls.rollout.process import EngineProcess
from ogls.rollout.transformers import TransformersEngine
from ogls.system.exits import EngineFailed
from tests.rollout.gap import logprob_gap
from tests.scripted import Fault, ScriptedEngine, numbers

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [100, 101] * 20]
SAMPLING = Sampling(max_tokens=8)


def draw(prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
    return [rng.randrange(3, 300) for _ in range(5)]


def guarded(folder: Path, faults: dict[int, Fault], policy: Any = None) -> tuple[EngineGuard, ScriptedEngine]:
    engine = ScriptedEngine(draw, faults)
    guard = EngineGuard(engine, patience=2.0 if "hang" in faults.values() else 60.0)
    guard.start(folder, 128)
    guard.load(policy, 4)
    return guard, engine


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param("die", "it was told to", marks=pytest.mark.fault("engine dies")),
        pytest.param("hang", "generating gave no sign of life", marks=pytest.mark.fault("engine hangs")),
        pytest.param("garbage", "outside of the vocabulary", marks=pytest.mark.fault("engine gives garbage")),
    ],
)
def test_an_engine_that_fails_once_is_rebuilt_and_gives_the_same(
    tiny_model: Path, fault: Fault, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = guarded(tiny_model, {})[0].generate(PROMPTS, SAMPLING, 2, seed=9)
    guard, engine = guarded(tiny_model, {0: fault})
    assert guard.generate(PROMPTS, SAMPLING, 2, seed=9) == expected
    assert (engine.starts, engine.loads, engine.version) == (2, [4, 4], 4)
    assert said in capfd.readouterr().err
    failing, _ = guarded(tiny_model, {0: fault, 1: fault})
    with pytest.raises(EngineFailed, match=f"failed again after it was rebuilt: .*{said}"):
        failing.generate(PROMPTS, SAMPLING, 2, seed=9)


@pytest.mark.fault("engine hangs")
@pytest.mark.parametrize("beside", [False, True], ids=["in this process", "in one of its own"])
def test_a_call_may_take_long_while_tokens_come(tiny_model: Path, beside: bool) -> None:
    """Twelve seconds of one call, with a patience of three."""
    engine = ScriptedEngine(numbers, {0: "long"})
    guard = EngineGuard(EngineProcess(engine) if beside else engine, patience=3.0)
    guard.start_patience = 60.0  # a process of its own imports for longer
    policy = Policy(str(tiny_model), lora=Lora(rank=4), dtype="float32").load()
    guard.start(tiny_model, 128)
    try:
        guard.load(policy, 4)
        guard.rebuild = pytest.fail  # pyright: ignore[reportAttributeAccessIssue]
        began = time.monotonic()
        assert len(guard.generate(PROMPTS, SAMPLING, 2, seed=9)) == len(PROMPTS)
        assert time.monotonic() - began > 12.0
    finally:
        guard.engine.close()


@pytest.mark.fault("weights in the engine are not the policy's")
def test_an_engine_that_keeps_old_weights_is_rebuilt(tiny_model: Path) -> None:
    _, engine = guarded(tiny_model, {0: "stale"})
    assert (engine.starts, engine.loads, engine.version) == (2, [4, 4], 4)
    with pytest.raises(EngineFailed, match=r"could not be rebuilt: .*holds version 3 of the weights, not 4"):
        guarded(tiny_model, {0: "stale", 1: "stale"})


def test_a_prompt_that_does_not_fit_is_no_failure_of_the_engine(tiny_model: Path) -> None:
    guard, engine = guarded(tiny_model, {})
    with pytest.raises(ValueError, match="prompt 0 does not fit"):
        guard.generate([[1] * 125], SAMPLING, 1, seed=0)
    assert engine.starts == 1


@pytest.mark.fault("empty, cut, endless rollouts")
def test_empty_completions_are_completions(tiny_model: Path) -> None:
    guard, engine = guarded(tiny_model, {0: "empty"})
    (group, *_) = guard.generate(PROMPTS, SAMPLING, 2, seed=9)
    assert group[0].token_ids == ()
    assert engine.starts == 1


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    torch.manual_seed(0)
    return Policy(str(tiny_model), lora=Lora(rank=4), dtype="float32").load()


class Another(TransformersEngine):
    """Samples from a policy of its own, which is changed to what it should not be."""

    def _load(self, policy: Policy) -> None:
        torch.manual_seed(0)
        other = Policy(policy.name, lora=policy.lora, dtype="float32").load()
        for own, given in zip(other.trainable().values(), policy.trainable().values(), strict=True):
            own.data += 0.05 * torch.randn_like(given)
        super()._load(other)


@pytest.mark.fault("weights in the engine are not the policy's")
def test_the_canary_sings_for_the_policy_and_dies_of_another(tiny_model: Path, policy: Policy) -> None:
    guard = EngineGuard(TransformersEngine())
    guard.start(tiny_model, 128)
    guard.load(policy, 0)
    guard.generate(PROMPTS, SAMPLING, 1, seed=0)
    assert logprob_gap(guard.engine, policy, PROMPTS, 16) < 1e-4

    wrong = EngineGuard(Another())
    wrong.start(tiny_model, 128)
    wrong.load(policy, 0)
    with pytest.raises(EngineFailed, match="the engine does not sample from the policy: log-probs differ by"):
        wrong.generate(PROMPTS, SAMPLING, 1, seed=0)
