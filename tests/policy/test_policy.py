"""The trunk against transformers' own pass, one sequence at a time; the adapter against peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from ogls.policy.lora import Adapted, Lora
from ogls.policy.policy import Policy

PREFIXES = [[5, 6, 7, 8, 9], [40, 41, 42], [100, 101, 102, 103, 104, 105, 106]]
SUFFIXES = [[11, 12, 13, 14], [21], [31, 32], [51, 52, 53, 54, 55, 56], [61, 62, 63], [71, 72]]
OWNERS = [1, 0, 0, 2, 0, 2]


def loaded(folder: Path, lora: Lora | None, **settings: Any) -> Policy:
    return Policy(str(folder), lora=lora, **settings).load()


def randomised(policy: Policy, seed: int = 0) -> Policy:
    """Give the adapter an effect: its B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in policy.trainable().items():
        if "lora_B" in name:
            p.data.normal_(std=0.2, generator=generator)
    return policy


def plain_states(policy: Policy, prefixes: list, suffixes: list, owners: list) -> Tensor:
    """What `hidden` should give: each sequence alone through the trunk, with transformers' own attention."""
    rows = []
    for suffix, owner in zip(suffixes, owners, strict=True):
        prefix = prefixes[owner]
        states = policy.trunk(input_ids=torch.tensor([prefix + suffix]), use_cache=False).last_hidden_state[0]
        rows.append(states[len(prefix) - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_an_adapted_layer(bias: bool) -> None:
    """Beside W + s B A made whole, and by finite differences; also for a layer whose input needs none."""
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b, shift = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((7, 5), (6, 5), (3, 5), (6, 3), (6,))
    )
    shift = shift if bias else None
    torch.testing.assert_close(
        Adapted.apply(x, weight, shift, a, b, 1.7), torch.nn.functional.linear(x, weight + 1.7 * b @ a, shift)
    )
    a, b = a.requires_grad_(), b.requires_grad_()
    for fed in (x, x.clone().requires_grad_()):
        of_inputs = (a, b, fed) if fed.requires_grad else (a, b)
        assert torch.autograd.gradcheck(lambda *_, x=fed: Adapted.apply(x, weight, shift, a, b, 1.7), of_inputs)


@pytest.fixture(params=["tiny_model", "tiny_qwen3"])
def policy(request: pytest.FixtureRequest) -> Policy:
    """In double precision (but for the norms, which transformers computes in single)."""
    policy = randomised(loaded(request.getfixturevalue(request.param), Lora(rank=4), dtype="float32"))
    return policy.double()


@pytest.mark.parametrize("share", [True, False])
def test_states_and_gradients_are_those_of_each_sequence_alone(policy: Policy, share: bool) -> None:
    def gradients(states: Tensor) -> dict[str, Tensor]:
        weights = torch.linspace(-1, 1, states.numel()).view_as(states)
        grads = torch.autograd.grad((states * weights).sum(), list(policy.trainable().values()))
        return dict(zip(policy.trainable(), grads, strict=True))

    expected = plain_states(policy, PREFIXES, SUFFIXES, OWNERS)
    got = policy.hidden(PREFIXES, SUFFIXES, OWNERS, share_prefixes=share)
    assert got.shape == (sum(map(len, SUFFIXES)), 64)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    expected_gradients = gradients(expected)
    for name, gradient in gradients(got).items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=2e-5, rtol=2e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_batch_is_as_good_as_one_by_one(tiny_model: Path, data: st.DataObject) -> None:
    policy = any_policy(tiny_model)
    ids = st.lists(st.integers(3, 319), min_size=1, max_size=9)
    prefixes = data.draw(st.lists(ids, min_size=1, max_size=4))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, len(prefixes) - 1), ids), min_size=1, max_size=7))
    owners, suffixes = [o for o, _ in pairs], [s for _, s in pairs]
    with torch.no_grad():
        alone = torch.cat([policy.hidden(prefixes, [s], [o]) for o, s in pairs])
        torch.testing.assert_close(policy.hidden(prefixes, suffixes, owners), alone, atol=2e-5, rtol=1e-5)


_POLICIES: dict[Path, Policy] = {}


def any_policy(path: Path) -> Policy:
    """One policy for all examples of a property."""
    if path not in _POLICIES:
        _POLICIES[path] = randomised(loaded(path, Lora(rank=4), dtype="float32"))
    return _POLICIES[path]


def test_head_on_states_is_the_models_logits(policy: Policy) -> None:
    weight, bias = policy.head
    ids = PREFIXES[0] + SUFFIXES[3]
    expected = policy.model(input_ids=torch.tensor([ids])).logits[0, len(PREFIXES[0]) - 1 : -1]
    assert bias is None
    torch.testing.assert_close(policy.hidden(PREFIXES, [SUFFIXES[3]], [0]) @ weight.T, expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_stays_near_float32(tiny_model: Path) -> None:
    exact = any_policy(tiny_model)
    rounded = loaded(tiny_model, Lora(rank=4))
    rounded.load_trainable({name: p.detach() for name, p in exact.trainable().items()})
    with torch.no_grad():
        a, b = (p.hidden(PREFIXES, SUFFIXES, OWNERS).float() for p in (exact, rounded))
    assert rounded.hidden(PREFIXES, SUFFIXES, OWNERS).dtype == torch.bfloat16
    assert {p.dtype for p in rounded.trainable().values()} == {torch.float32}
    assert (a - b).abs().mean() < 0.05 * a.abs().mean()


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Path) -> None:
    found = []
    for checkpointing in (False, True):
        policy = loaded(tiny_model, Lora(rank=4), dtype="float32", gradient_checkpointing=checkpointing)
        policy.load_trainable({name: p.detach() for name, p in any_policy(tiny_model).trainable().items()})
        policy.train()
        policy.hidden(PREFIXES, SUFFIXES, OWNERS).square().mean().backward()
        found.append({name: p.grad for name, p in policy.trainable().items()})
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-6, rtol=1e-5)


def test_settings_folder_and_tokenizer_are_there_before_the_weights(tiny_model: Path) -> None:
    policy = Policy(str(tiny_model), lora=Lora(rank=4), dtype="float32")
    assert policy.folder == tiny_model
    assert policy.tokenizer.eos_token_id == 2
    assert list(policy.parameters()) == []
    assert policy.load() is policy
    model = policy.model
    assert policy.load().model is model
    with pytest.raises(
        ValueError, match=r"policy.adapter: no folder 'nowhere' in the working directory or the project"
    ):
        _ = Policy(str(tiny_model), adapter="nowhere").folder


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_at_the_start_weights_and_version_are_those_of_the_folder(tiny_model: Path, lora: Lora | None) -> None:
    policy = loaded(tiny_model, lora, dtype="float32")
    start = policy.hidden(PREFIXES, SUFFIXES, OWNERS).detach()
    for p in policy.trainable().values():
        p.data += 0.05
    policy.version = 7
    moved = policy.hidden(PREFIXES, SUFFIXES, OWNERS).detach()
    assert not torch.equal(moved, start)
    own = {name: p.detach().clone() for name, p in policy.trainable().items()}
    with policy.at_start():
        assert policy.version == 0
        assert torch.equal(policy.hidden(PREFIXES, SUFFIXES, OWNERS), start)
        with policy.swapped(own):
            assert policy.version == 0
        with policy.swapped(own, version=5):
            assert policy.version == 5
            assert torch.equal(policy.hidden(PREFIXES, SUFFIXES, OWNERS), moved)
        assert policy.version == 0
    with policy.swapped(own):
        assert policy.version == 7
    assert policy.version == 7
    with pytest.raises(RuntimeError, match="lost"), policy.at_start():
        raise RuntimeError("lost")
    assert policy.version == 7
    assert torch.equal(policy.hidden(PREFIXES, SUFFIXES, OWNERS), moved)


def test_full_weights_train_all_but_embeddings_and_head(tiny_model: Path) -> None:
    policy = loaded(tiny_model, None)
    assert not any("embed" in name or "lm_head" in name for name in policy.trainable())
    assert len(policy.trainable()) == 2 * 9 + 1  # seven projections and two norms a layer, and the last norm
    assert policy.head[0].dtype == torch.bfloat16
    states = policy.hidden(PREFIXES, SUFFIXES, OWNERS)
    assert states.dtype == torch.bfloat16
    states.float().square().mean().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in policy.trainable().values())
    assert {w.dtype for _, w in policy.merged_weights()} == {torch.bfloat16}


def test_peft_reads_the_adapter_and_computes_the_same(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = any_policy(tiny_model)
    policy.save_adapter(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.tensor([PREFIXES[2]])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, tmp_path)(input_ids=ids).logits
        torch.testing.assert_close(policy.model(input_ids=ids).logits, theirs, atol=1e-4, rtol=1e-4)
    other = loaded(tiny_model, Lora(rank=4), dtype="float32")
    other.load_adapter(tmp_path)
    assert all(torch.equal(p, policy.trainable()[name]) for name, p in other.trainable().items())


def test_merged_weights_are_the_policy_and_leave_the_base_alone(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    policy = any_policy(tiny_model)
    before = {name: p.clone() for name, p in policy.model.state_dict().items()}
    merged = dict(policy.merged_weights())
    assert merged.keys() <= load_file(tiny_model / "model.safetensors").keys()
    assert all(torch.equal(p, before[name]) for name, p in policy.model.state_dict().items())
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.load_state_dict(merged, strict=False)
    ids = torch.tensor([PREFIXES[2]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(policy.model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    policy = any_policy(tiny_model)
    stray, rank4 = tmp_path / "stray", tmp_path / "rank4"
    policy.save_adapter(stray)
    policy.save_adapter(rank4)
    file = stray / "adapter_model.safetensors"
    save_file({name.replace("layers.1.", "layers.7."): w for name, w in load_file(file).items()}, file)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("share embeddings and output head", lambda: Lora(targets=("q_proj", "lm_head"))),
        (r"policy.lora.rank must be in \[1, 65536\], got 0", lambda: Lora(rank=0)),
        (r"\['c_attn'\] match no layer", lambda: loaded(tiny_model, Lora(targets=("c_attn", "q_proj")))),
        ("one owner for each", lambda: policy.hidden([[1]], [[2]], [0, 0])),
        ("continues prefix 3", lambda: policy.hidden([[1]], [[2]], [3])),
        ("need a token each: got 0 and 1", lambda: policy.hidden([[1]], [[]], [0])),
        ("not in both", lambda: policy.load_trainable({})),
        ("no adapter to save", lambda: loaded(tiny_model, None).save_adapter(tmp_path)),
        ("expected", lambda: loaded(tiny_model, Lora(rank=8)).load_adapter(rank4)),
        ("of another model", lambda: loaded(tiny_model, Lora(rank=4)).load_adapter(stray)),
    ]
    for message, attempt in cases:
        with pytest.raises(ValueError, match=message):
            attempt()


def test_capped_logits_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "gemma2", "gemma2", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="soft-caps its logits"):
        loaded(folder, Lora(rank=4))


def test_scaled_logits_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "granite", "granite", logits_scaling=4.0)
    with pytest.raises(ValueError, match=r"off head\(last states\)"):
        loaded(folder, Lora(rank=4), dtype="float32")
