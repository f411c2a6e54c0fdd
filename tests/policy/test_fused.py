"""Fused layers compute what transformers' own do: whole models in Triton's interpreter; built for two generations."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import interpreted_layers
import pytest
import torch
from interpreted_layers import ARCHITECTURES
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from ogls.policy.fused import fuse_layers
from tests.loss.test_triton_rows import as_it_is, built_for

pytest.importorskip("triton", reason="triton comes with vLLM and with torch for GPUs")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("interpreted") / "layers.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, interpreted_layers.__file__, str(file)], env=environment, check=True)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_with_kernels_is_the_model(architecture: str, interpreted: dict[str, Any]) -> None:
    """In double precision, states and the gradients of all adapter weights; two layers, each rotates q and k."""
    found = interpreted[architecture]
    for got, expected in zip(found["by_kernel"], found["plain"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    assert found["calls"] == {"swiglu": 2, "swiglu_backward": 2, "rotated": 2 * (2 + 2)}
    assert found["none"] == {}


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "tensors", "numbers", "constants"),
    [
        ("_swiglu", "gates ups outs", "size", {"BLOCK": 1024}),
        ("_swiglu_backward", "grads gates ups of_gates of_ups", "size", {"BLOCK": 1024}),
        (
            *("_rotate", "xs cosines sines outs", "heads head_step token_step out_head_step out_token_step"),
            {"HALF": 64, "HEADS": 16, "COLUMNS": 64, "BACK": True},
        ),
    ],
)
def test_the_kernels_are_built_for_gpus(
    kernel: str, tensors: str, numbers: str, constants: dict[str, Any], architecture: int
) -> None:
    types = dict.fromkeys(tensors.split(), "*bf16") | dict.fromkeys(numbers.split(), "i32")
    built_for(architecture, as_it_is("triton_layer", "policy"), kernel, types, constants)


class OwnMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


def test_an_odd_gate_stays() -> None:
    """A model whose MLP has another activation, or code of its own, keeps its forward pass."""
    silu, gelu = (LlamaConfig(hidden_size=32, intermediate_size=8, hidden_act=name) for name in ("silu", "gelu"))
    model = torch.nn.ModuleList([LlamaMLP(silu), LlamaMLP(gelu), OwnMLP(silu)])
    fuse_layers(model)
    assert ["forward" in vars(module) for module in model] == [True, False, False]


def test_rotation_is_replaced_once_and_on_a_cpu_it_is_the_models_own() -> None:
    from transformers.models.llama import modeling_llama

    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=8))
    fuse_layers(model)
    once = modeling_llama.apply_rotary_pos_emb
    fuse_layers(model)
    assert modeling_llama.apply_rotary_pos_emb is once
    q, cos, sin = torch.randn(1, 1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    half = torch.cat([-q[..., 4:], q[..., :4]], dim=-1)
    for got in once(q, q, cos, sin):
        torch.testing.assert_close(got, q * cos[:, None] + half * sin[:, None])
