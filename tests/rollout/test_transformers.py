from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.records import Sampling
from ogls.rollout.engine import end_token_ids, prompt_seeds
from ogls.rollout.transformers import TransformersEngine, draw

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [100, 101]]


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return Policy(str(tiny_model), lora=Lora(rank=4), dtype="float32").load()


@pytest.fixture
def engine(tiny_model: Path, policy: Policy) -> TransformersEngine:
    engine = TransformersEngine(batch_size=4)
    engine.start(tiny_model, context_length=128)
    engine.load(policy, version=7)
    return engine


def test_logprobs_are_the_policys_own(engine: TransformersEngine, policy: Policy) -> None:
    sampling = Sampling(max_tokens=30, temperature=0.8)
    groups = engine.generate(PROMPTS, sampling, n=3, seed=1)
    assert engine.version == 7
    weight, _ = policy.head
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 3
        for completion in group:
            ids = completion.token_ids
            ended = ids[-1] in end_token_ids(policy.folder)
            assert completion.finish_reason == ("stop" if ended else "length")
            assert not set(ids[:-1]) & set(end_token_ids(policy.folder))
            assert ended or len(ids) == 30
            logits = policy.hidden([prompt], [ids], [0]) @ weight.T
            expected = (logits / 0.8).log_softmax(-1)[torch.arange(len(ids)), list(ids)]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected.detach(), atol=1e-4, rtol=1e-4)


def test_some_stop_and_some_run_out(engine: TransformersEngine) -> None:
    groups = engine.generate(PROMPTS, Sampling(max_tokens=60), n=24, seed=0)
    assert {c.finish_reason for group in groups for c in group} == {"stop", "length"}


def test_seed_decides(engine: TransformersEngine) -> None:
    sampling = Sampling(max_tokens=12, top_p=0.9, top_k=50)
    first, again, other = (engine.generate(PROMPTS, sampling, n=3, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert len({c.token_ids for c in first[0]}) == 3


def test_what_a_prompt_gets_depends_on_no_other_prompt(engine: TransformersEngine) -> None:
    sampling = Sampling(max_tokens=12, top_p=0.9)
    whole = engine.generate(PROMPTS, sampling, n=3, seed=5)
    shares = [engine.generate(PROMPTS[i::2], sampling, n=3, seed=5) for i in range(2)]
    engine.batch_size = 64
    backwards = engine.generate(PROMPTS[::-1], sampling, n=3, seed=5)
    for i, group in enumerate(whole):
        assert [c.token_ids for c in shares[i % 2][i // 2]] == [c.token_ids for c in group]
        assert [c.token_ids for c in backwards[-1 - i]] == [c.token_ids for c in group]
    twice = engine.generate([PROMPTS[0]] * 2, sampling, n=3, seed=5)
    assert {c.token_ids for c in twice[0]}.isdisjoint(c.token_ids for c in twice[1]), "a prompt that comes twice"


def test_every_prompt_has_a_seed_of_its_own() -> None:
    seeds = prompt_seeds([[1], [2], [1], [1, 2]], 5)
    assert len(set(seeds)) == 4
    assert prompt_seeds([[1, 2], [1]], 5) == [seeds[3], seeds[0]]
    assert not set(seeds) & set(prompt_seeds([[1], [2], [1], [1, 2]], 6))


def test_tokens_are_drawn_by_cumulative_probability() -> None:
    logits = torch.tensor([[0.2, 0.3, 0.0, 0.5]]).log().repeat(6, 1)
    uniform = torch.tensor([0.0, 0.199, 0.201, 0.499, 0.501, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = draw(logits, Sampling(max_tokens=1), uniform)
    assert tokens.tolist() == [0, 0, 1, 1, 3, 3]
    torch.testing.assert_close(logprobs, torch.tensor([0.2, 0.2, 0.3, 0.3, 0.5, 0.5]).log())
    tokens, _ = draw(logits.flip(-1), Sampling(max_tokens=1, top_k=1), uniform)
    assert tokens.tolist() == [0] * 6
    tokens, _ = draw(logits, Sampling(max_tokens=1, top_k=1), uniform)
    assert tokens.tolist() == [3] * 6, "what is cut off is never drawn, at 0 neither"


def test_cut_distribution_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)
    uniform = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw(logits, Sampling(max_tokens=1, top_p=0.7), uniform)
    assert set(tokens.tolist()) == {0, 1}  # 0.5 does not reach 0.7, 0.8 does
    expected = torch.tensor([0.5, 0.3]).log() - torch.tensor(0.8).log()
    torch.testing.assert_close(logprobs, expected[tokens])
    tokens, logprobs = draw(logits, Sampling(max_tokens=1, top_k=3, temperature=0.5), uniform)
    squares = torch.tensor([0.5, 0.3, 0.15]).square()
    torch.testing.assert_close(logprobs, (squares / squares.sum()).log()[tokens])
    tokens, logprobs = draw(logits, Sampling(max_tokens=1, temperature=0), uniform)
    assert set(tokens.tolist()) == {0}
    torch.testing.assert_close(logprobs, torch.full((400,), 0.5).log())


def test_greedy_is_the_likeliest_path(engine: TransformersEngine, policy: Policy) -> None:
    (group,) = engine.generate([PROMPTS[1]], Sampling(max_tokens=8, temperature=0), n=2, seed=0)
    assert group[0] == group[1]
    weight, _ = policy.head
    best = (policy.hidden([PROMPTS[1]], [group[0].token_ids], [0]) @ weight.T).argmax(-1)
    assert tuple(best.tolist()) == group[0].token_ids


def test_what_does_not_fit_is_refused(tiny_model: Path, engine: TransformersEngine) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 does not fit: 6 prompt tokens \+ max_tokens 125 = 131.* holds 128"):
        engine.generate(PROMPTS, Sampling(max_tokens=125), n=1, seed=0)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.generate([[]], Sampling(max_tokens=1), n=1, seed=0)
    with pytest.raises(ValueError, match="n, the completions per prompt"):
        engine.generate(PROMPTS, Sampling(max_tokens=1), n=0, seed=0)
    with pytest.raises(ValueError, match="call load"):
        _ = TransformersEngine().version
    with pytest.raises(ValueError, match="top_p"):
        Sampling(max_tokens=1, top_p=0.0)
    engine.close()
    with pytest.raises(ValueError, match="call load"):
        engine.generate(PROMPTS, Sampling(max_tokens=1), n=1, seed=0)
