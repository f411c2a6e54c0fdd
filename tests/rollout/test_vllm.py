"""Real vLLM with a tiny model: what it samples from must be the policy, after every change of the weights."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.records import Completion, Sampling
from ogls.rollout.engine import end_token_ids
from ogls.rollout.guard import EngineGuard
from ogls.rollout.process import EngineProcess
from ogls.rollout.vllm import VllmEngine
from tests.rollout.gap import logprob_gap

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the extra cpu or cuda"),
    pytest.mark.filterwarnings("default"),  # vLLM's own
]
PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [100, 101] * 20]
SAMPLING = Sampling(max_tokens=40, temperature=0.8)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(sync="merged", memory_gib=0.25, max_num_seqs=64)
    engine.start(tiny_model, context_length=256)
    yield engine
    engine.close()


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    torch.manual_seed(0)
    return Policy(str(tiny_model), lora=Lora(rank=8)).load()


def shift(policy: Policy, size: float = 0.03) -> None:
    for p in policy.trainable().values():
        p.data += size * torch.randn_like(p)


def mismatch(policy: Policy, groups: list[list[Completion]], temperature: float = 0.8) -> float:
    """Mean |log-prob by the engine - log-prob by the policy| of the sampled tokens."""
    suffixes = [c.token_ids for group in groups for c in group]
    owners = [i for i, group in enumerate(groups) for _ in group]
    weight, _ = policy.head
    with torch.no_grad():
        logits = (policy.hidden(PROMPTS, suffixes, owners).float() @ weight.float().T) / temperature
    ids = torch.tensor([t for suffix in suffixes for t in suffix])
    own = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    theirs = torch.tensor([x for group in groups for c in group for x in c.logprobs])
    return float((own - theirs).abs().mean())


def test_engine_samples_from_the_policy_after_every_change(engine: VllmEngine, policy: Policy) -> None:
    for version in range(3):
        engine.load(policy, version)
        assert engine.version == version
        groups = engine.generate(PROMPTS, SAMPLING, n=8, seed=version)
        assert mismatch(policy, groups) <= 0.03
        shift(policy)
        assert mismatch(policy, groups) > 0.2  # the check can tell an old policy from a new one


def test_every_token_is_a_sign_of_life(engine: VllmEngine, policy: Policy) -> None:
    engine.load(policy, 0)
    before = engine.beats
    (group,) = engine.generate(PROMPTS[:1], SAMPLING, n=1, seed=0)
    assert engine.beats - before >= len(group[0].token_ids)


def test_completions_are_whole(engine: VllmEngine, policy: Policy) -> None:
    engine.load(policy, 0)
    groups = engine.generate(PROMPTS, SAMPLING, n=16, seed=0)
    assert [len(group) for group in groups] == [16] * 3
    ends = set(end_token_ids(policy.folder))
    for completion in (c for group in groups for c in group):
        ids = completion.token_ids
        assert len(ids) == len(completion.logprobs) <= 40
        assert completion.finish_reason == ("stop" if ids[-1] in ends else "length")
        assert completion.finish_reason == "stop" or len(ids) == 40
        assert not ends & set(ids[:-1])
    assert {c.finish_reason for group in groups for c in group} == {"stop", "length"}


def test_seed_decides_and_the_trainers_generator_is_left_alone(engine: VllmEngine, policy: Policy) -> None:
    engine.load(policy, 0)
    before = torch.get_rng_state()
    first, again, other = (engine.generate(PROMPTS, SAMPLING, n=4, seed=seed) for seed in (5, 5, 6))
    assert [[c.token_ids for c in g] for g in first] == [[c.token_ids for c in g] for g in again]
    assert first != other
    assert len({c.token_ids for c in first[0]}) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_what_does_not_fit_is_refused(engine: VllmEngine, policy: Policy) -> None:
    engine.load(policy, 0)
    with pytest.raises(ValueError, match="prompt 2 does not fit"):
        engine.generate(PROMPTS, Sampling(max_tokens=220), n=1, seed=0)


def perturbed(weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in weights:
        spoilt = value + value.float().std() * torch.randn_like(value)
        yield name, spoilt if name.endswith("1.mlp.down_proj.weight") else value


def dropped(weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, value) for name, value in weights if not name.endswith("1.mlp.down_proj.weight"))


@pytest.mark.slow
@pytest.mark.fault("weights in the engine are not the policy's")
@pytest.mark.parametrize("sabotage", ["none", "one perturbed", "one dropped", "sync skipped", "prefix cache kept"])
def test_the_canary_tells_an_engine_with_other_weights(
    engine: VllmEngine,
    policy: Policy,
    sabotage: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """First the weights are right, and the engine's prefix cache holds the canaries' prompts; then they change."""
    canaries = [[(7 * i + 11 * j) % 250 + 5 for j in range(200)] for i in range(4)]
    engine.load(policy, 0)
    assert logprob_gap(engine, policy, canaries, 16) <= EngineGuard(engine).max_gap
    shift(policy, 0.05)
    weights, reset = policy.merged_weights, engine._llm.reset_prefix_cache
    if sabotage in ("one perturbed", "one dropped"):
        spoil = perturbed if sabotage == "one perturbed" else dropped
        monkeypatch.setattr(policy, "merged_weights", lambda: spoil(weights()))
    elif sabotage == "sync skipped":
        monkeypatch.setattr(engine, "_load", lambda policy: None)
    elif sabotage == "prefix cache kept":
        monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
    engine.load(policy, 1)
    gap = logprob_gap(engine, policy, canaries, 16)
    reset()
    record_property("figure", f"vLLM, {sabotage}: {gap:.4f}")
    assert (gap <= EngineGuard(engine).max_gap) == (sabotage == "none")


@pytest.mark.parametrize("lora", [Lora(rank=8, targets=("q_proj", "up_proj")), None], ids=["two targets", "full"])
def test_other_trainable_sets_are_synced_too(engine: VllmEngine, tiny_model: Path, lora: Lora | None) -> None:
    """vLLM fuses q, k, v and gate, up: giving it one of them must not spoil the others.

    Full weights come last: what they change (norms, say) no later adapter would put back, and the canary would say so.
    """
    engine.load(Policy(str(tiny_model), lora=lora).load(), 0)
    policy = Policy(str(tiny_model), lora=lora).load()
    shift(policy, 0.05 if lora is None else 0.1)
    engine.load(policy, 1)
    assert mismatch(policy, engine.generate(PROMPTS, SAMPLING, n=8, seed=0)) <= 0.03


@pytest.mark.slow
def test_adapter_is_swapped_after_every_change(engine: VllmEngine, policy: Policy) -> None:
    engine.close()  # one engine a process at a time; this test is the last that needs one
    swapping = VllmEngine(sync="adapter", memory_gib=0.25, max_num_seqs=64, max_lora_rank=8)
    swapping.start(policy.folder, context_length=256)
    for version in (0, 0, 1):  # a version may come twice, with other weights: they count
        shift(policy)
        swapping.load(policy, version)
        assert mismatch(policy, swapping.generate(PROMPTS, SAMPLING, n=8, seed=version)) <= 0.03
    with pytest.raises(ValueError, match="rank 16, the engine takes up to 8"):
        swapping.load(Policy(policy.name, lora=Lora(rank=16)).load(), 2)
    with pytest.raises(ValueError, match=r'no adapter: set data.engine.sync to "merged"'):
        swapping.load(Policy(policy.name, lora=None).load(), 2)
    swapping.close()


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_in_a_process_of_its_own_it_samples_from_the_policy_too(
    sync: Literal["merged", "adapter"], policy: Policy
) -> None:
    beside = EngineProcess(VllmEngine(sync=sync, memory_gib=0.25, max_num_seqs=64, max_lora_rank=8))
    with closing(beside):
        beside.start(policy.folder, context_length=256)
        for version in range(2):
            shift(policy)
            beside.load(policy, version)
            groups = beside.generate(PROMPTS, SAMPLING, n=8, seed=version)
            assert mismatch(policy, groups) <= 0.03


def test_an_engine_without_weights_says_so() -> None:
    with pytest.raises(ValueError, match="call load"):
        _ = VllmEngine().version
    with pytest.raises(ValueError, match="memory_gib"):
        VllmEngine(memory_gib=0)


def test_missing_vllm_names_the_extras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ogls\[cpu\].*ogls\[cuda\]"):
        VllmEngine().start(tmp_path, context_length=16)


@pytest.mark.parametrize("eager", [False, True])
def test_a_long_start_is_told(
    eager: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU vLLM compiles for minutes, and says nothing meanwhile."""

    class Started(Exception):
        pass

    def start(**options: object) -> None:
        raise Started

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    with pytest.raises(Started):
        VllmEngine(enforce_eager=eager).start(tiny_model, context_length=16)
    assert ("takes minutes" in capsys.readouterr().err) == (not eager)
