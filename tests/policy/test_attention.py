"""Attention over a packed row: the two layouts agree, and what a GPU is asked to do is no more than is needed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from analysis.benchmarks.fake_gpu import FakeGpu, qwen3
from ogls.policy import packing as packing_module
from ogls.policy.attention import Gather, packed_attention
from ogls.policy.layout import Grids, Varlen, layout, varlen
from ogls.policy.lora import Lora
from ogls.policy.packing import Packing, pack
from tests.policy import flash
from tests.policy.test_policy import OWNERS, PREFIXES, SUFFIXES, loaded, plain_states, randomised

CPU, META = torch.device("cpu"), torch.device("meta")


def drawn(seed: int) -> tuple[list[list[int]], list[list[int]], list[int], bool]:
    """Prefixes, suffixes, owners, and whether prefixes are shared."""
    rng = random.Random(seed)
    prefixes = [[1] * rng.randint(1, 30) for _ in range(rng.randint(1, 4))]
    suffixes = [[1] * rng.choice([1, 1, 2, 5, 17, 40]) for _ in range(rng.randint(1, 8))]
    return prefixes, suffixes, [rng.randrange(len(prefixes)) for _ in suffixes], rng.random() < 0.8


def lengths(packed: Packing) -> tuple[list[int], list[int], list[int]]:
    """Of roots and of branches, and the branches' owners."""
    assert isinstance(packed.layout, Grids)
    of = lambda grid: [] if grid is None else (grid.tokens // grid.longest).bincount().tolist()  # noqa: E731
    return of(packed.layout.roots), of(packed.layout.branches), packed.layout.owners.tolist()


@pytest.mark.parametrize("seed", range(40))
def test_both_layouts_give_the_same_output_and_gradients(seed: int) -> None:
    *sequences, share = drawn(seed)
    row = pack(*sequences, share_prefixes=share, device=CPU, dtype=torch.float64)
    roots, branches, owners = lengths(row)
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(roots) + sum(branches)
    inputs = [torch.randn(1, h, tokens, 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2)]
    weight = torch.randn(tokens, 4, 8, dtype=torch.float64, generator=generator)
    found = []
    for layout_ in (row.layout, varlen(roots, branches, owners, CPU)):
        xs = [x.clone().requires_grad_() for x in inputs]
        out, _ = packed_attention(torch.nn.Identity(), *xs, None, packing=replace(row, layout=layout_))
        found.append((out[0], *torch.autograd.grad((out[0] * weight).sum(), xs)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-13, rtol=1e-12)


def test_layout_by_hand() -> None:
    """Two roots of 3 and 2 tokens; branches of 2 and 1 tokens continue the first, one of 1 the second."""
    got = varlen([3, 2], [2, 1, 1], [0, 0, 1], CPU)
    assert got.query_starts.tolist() == [0, 3, 5, 7, 8, 9]
    assert got.keys is not None
    assert got.keys.tolist() == [0, 1, 2, 3, 4, *(0, 1, 2, 5, 6), *(0, 1, 2, 7), *(3, 4, 8)]
    assert got.key_starts.tolist() == [0, 3, 5, 10, 14, 17]
    assert (got.longest_query, got.longest_key) == (3, 5)
    uses = got.uses.tensor_split(got.use_starts[1:-1])
    assert [use.tolist() for use in uses] == [
        [0, 5, 10],
        [1, 6, 11],
        [2, 7, 12],
        [3, 14],
        [4, 15],
        [8],
        [9],
        [13],
        [16],
    ]
    assert varlen([3, 2], [], [], CPU).keys is None


def test_layout_by_device_and_dtype() -> None:
    kinds = {(d, t): type(layout([3], [2], [0], d, t)) for d in (CPU, META) for t in (torch.bfloat16, torch.float32)}
    assert kinds.pop((META, torch.bfloat16)) is Varlen
    assert set(kinds.values()) == {Grids}


def test_gradients_of_a_shared_key_are_summed_in_fp32() -> None:
    """400 ones: summed in bf16 they stay at 256, since adding 1 to 256 does nothing there."""
    row = varlen([1], [1] * 399, [0] * 399, CPU)
    x = torch.zeros(400, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    Gather.apply(x, row.keys, row.uses, row.use_starts).sum().backward()
    assert x.grad is not None
    assert x.grad[0].float().unique().tolist() == [400.0]


@pytest.mark.parametrize("lora", [Lora(rank=4), None], ids=["adapter", "all weights"])
@pytest.mark.parametrize("model", ["tiny_model", "tiny_qwen3"])
def test_a_policy_that_packs_for_a_gpu_gives_states_and_gradients_of_each_sequence_alone(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str, lora: Lora | None
) -> None:
    policy = randomised(loaded(request.getfixturevalue(model), lora, dtype="float32")).double()
    monkeypatch.setattr(packing_module, "layout", lambda *args: varlen(*args[:3], CPU))
    monkeypatch.setattr(packing_module, "rounded_up", lambda n, _: n)
    flash.CALLS.clear()
    weights = list(policy.trainable().values())

    def gradients(states: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad((states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum(), weights)

    got, expected = policy.hidden(PREFIXES, SUFFIXES, OWNERS), plain_states(policy, PREFIXES, SUFFIXES, OWNERS)
    assert len(flash.CALLS) == policy.model.config.num_hidden_layers
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    for a, b in zip(gradients(got), gradients(expected), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", [(200, [1024] * 8), (8400, [600, 8192, 600, 2000, 8192]), (200, [1, 8192])])
def test_scores_are_those_that_are_needed(shape: tuple[int, list[int]]) -> None:
    """Pairs of query and key that flash attention computes: at most 1.02 of those that a group needs."""
    prefix, suffixes = shape
    branches = [n - 1 for n in suffixes if n > 1]
    row = varlen([prefix], branches, [0] * len(branches), CPU)
    pairs = sum(
        n * (m - n) + n * (n + 1) // 2
        for n, m in zip(row.query_starts.diff().tolist(), row.key_starts.diff().tolist(), strict=True)
    )
    needed = prefix * (prefix + 1) // 2 + sum(prefix + i for n in suffixes for i in range(1, n))
    assert needed <= pairs <= 1.02 * needed


@pytest.mark.parametrize(("lora", "kernels"), [(Lora(rank=64), 47), (None, 30)], ids=["adapter", "all weights"])
def test_kernels_and_largest_tensor_of_a_layer_on_a_gpu(lora: Lora | None, kernels: int) -> None:
    prefix, suffixes = 8400, [600, 8192, 600, 2000, 8192]  # the longest is many times the shortest
    found = []
    for layers in (1, 2):
        with FakeGpu() as gpu:
            policy = gpu.policy(qwen3("1.7B", num_hidden_layers=layers), lora)
            gpu.reset()
            policy.hidden([[1] * prefix], [[1] * n for n in suffixes], [0] * len(suffixes))
        found.append(gpu)
    per_layer = found[1].kernels - found[0].kernels
    assert per_layer["_varlen_attn"] == 1
    assert per_layer.total() <= kernels, per_layer
    assert found[1].largest <= 4 * (prefix + sum(suffixes)) * 6144
    assert not found[1].waits
