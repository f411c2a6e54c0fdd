"""Whether an engine holds the present weights: it has to fit them better than those before, and than the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.records import Completion, Sampling
from ogls.rollout import canary
from ogls.rollout.canary import Canary, count_nearer
from ogls.rollout.engine import RolloutEngine
from ogls.rollout.guard import EngineGuard
from ogls.rollout.transformers import TransformersEngine
from ogls.system.exits import EngineFailed
from tests.faults.nursery import Nursery
from tests.rollout.gap import logprob_gap
from tests.rollout.stuck import RoundingEngine, StuckEngine, StuckRoundingEngine, UnreadEngine
from tests.test_cli import run_in, small

PROMPTS = [[5 + i, 6, 7 + i] for i in range(8)]
SAMPLING = Sampling(max_tokens=16)
SELECTION = ("--method.selection", "AllTokens")
pytestmark = pytest.mark.fault("weights in the engine are not the policy's")


@pytest.fixture(params=["adapter", "all weights"])
def policy(request: pytest.FixtureRequest, tiny_model: Path) -> Policy:
    torch.manual_seed(0)
    lora = Lora(rank=4) if request.param == "adapter" else None
    return Policy(str(tiny_model), lora=lora, dtype="float32").load()


def guarded(engine: RolloutEngine, policy: Policy, version: int = 0) -> EngineGuard:
    guard = EngineGuard(engine)
    guard.start(policy.folder, 128)
    guard.load(policy, version)
    guard.generate(PROMPTS, SAMPLING, 1, seed=0)
    return guard


def update(policy: Policy, size: float) -> None:
    """As an optimiser would: every weight moves by about `size`."""
    for p in policy.trainable().values():
        p.data += size * torch.randn_like(p)
    policy.version += 1


def test_nearer_by_hand():
    theirs, now, old = (torch.tensor(x) for x in ([-1.0, -2.0, -3.0, -4.0], [-1.1, -2.0, -3.5, -4], [-1.2, -1, -3, -4]))
    assert count_nearer(theirs, now, old) == (2, 3)  # the last says nothing, since the two agree


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_a_stuck_engine_is_refused_after_one_update(size: float, policy: Policy):
    guard = guarded(StuckEngine(), policy)
    update(policy, size)
    with pytest.raises(EngineFailed, match=r"does not hold the present weights, version 1: .* to that of version 0"):
        guard.load(policy, 1)
    assert logprob_gap(guard.engine, policy, PROMPTS, 16) < 0.1, "that alone would not tell"


def test_a_sound_engine_is_not_refused(policy: Policy):
    guard = guarded(TransformersEngine(), policy)
    for version in range(1, 9):
        update(policy, (0.0, 1e-8, 1e-5, 1e-2)[version % 4])
        guard.load(policy, version)
        if version % 2:  # as for replies of the start's weights
            with policy.at_start():
                guard.load(policy, 0)


def test_an_engine_that_rounds_is_refused_when_it_is_stuck_and_only_then(tiny_model: Path):
    torch.manual_seed(0)
    policy = Policy(str(tiny_model), lora=Lora(rank=4), dtype="float32").load()
    sound, stuck = guarded(RoundingEngine(), policy), guarded(StuckRoundingEngine(), policy)
    for version in range(1, 40):
        update(policy, 5e-4)
        sound.load(policy, version)
    with pytest.raises(EngineFailed, match=r"version 40: .* to that of version 0"):
        stuck.load(policy, 40)


def test_an_engine_that_never_left_the_start_is_refused_when_a_run_goes_on(policy: Policy):
    for _ in range(5):
        update(policy, 1e-3)
    guarded(TransformersEngine(), policy, 5)
    with pytest.raises(EngineFailed, match=r"version 5: .* to that of version 0"):
        guarded(UnreadEngine(), policy, 5)


def test_a_run_with_a_stuck_engine_ends_with_75_after_one_update(nursery: Nursery, tiny_model: Path, tmp_path: Path):
    arguments = [word.replace("TransformersEngine", "tests.rollout.stuck.StuckEngine") for word in small(tiny_model)]
    learns = ["--method", "OPSD", "--data.group_size", "2"]
    code, output = run_in(nursery, "fit", *[a for a in arguments if a not in SELECTION], *learns, cwd=tmp_path)
    assert code == 75, output[-3000:]
    assert "the engine does not hold the present weights, version 1: of " in output
    assert output.count("error:") == 1
    assert "Traceback" not in output
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "checkpoints" / "last.ckpt").is_file()


class Said(TransformersEngine):
    """Draws what it is told to."""

    def __init__(self, version: int, ids: tuple[int, ...], logprobs: Tensor) -> None:
        super().__init__()
        self._version = version
        self.drawn = Completion(token_ids=ids, logprobs=tuple(logprobs.tolist()), finish_reason="length")

    def generate(self, *_: Any, **__: Any) -> list[list[Completion]]:
        return [[self.drawn]]


def test_tokens_that_are_not_drawn_again_say_nothing(monkeypatch: pytest.MonkeyPatch):
    """30 tokens as the old weights have them, then 70 others as the new ones do: a stuck engine that wanders off."""
    first, ids = tuple(range(100)), (*range(30), *range(200, 270))
    now, old = torch.full((100,), -1.1), torch.full((100,), -1.0)
    says = iter([[old], [now]])
    monkeypatch.setattr(canary, "logprobs", lambda *_: next(says))
    check: Any = Canary(max_gap=0.1).check
    check(Said(0, first, old), None, [[1]], 100)
    with pytest.raises(RuntimeError, match="of 30 tokens, it gives 0 a log-prob nearer"):
        check(Said(1, ids, torch.cat([old[:30], now[30:]])), None, [[1]], 100)
