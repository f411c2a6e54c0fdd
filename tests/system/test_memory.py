"""The memory plan: its bytes against a pass of the policy on meta tensors, its choices against what they are for."""

from __future__ import annotations

from typing import Any

import pytest

from ogls.policy.lora import PROJECTIONS, Lora
from ogls.system.memory.shapes import Shapes
from ogls.system.memory.training import Training
from tests.policy.on_meta import Measured, as_on_a_gpu, measured, meta_policy

QWEN3: dict[str, tuple[int, ...]] = {  # states, layers, query and key heads, MLP, tied
    "0.6B": (1024, 28, 16, 8, 3072, True),
    "1.7B": (2048, 28, 16, 8, 6144, True),
    "4B": (2560, 36, 32, 8, 9728, True),
    "8B": (4096, 36, 32, 8, 12288, False),
}
LORA = Lora(rank=64, alpha=128)


def config(size: str, **changes: Any) -> dict[str, Any]:
    """What stands in the config.json of a Qwen3."""
    hidden, layers, heads, kv_heads, mlp, tied = QWEN3[size]
    return {
        **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": hidden, "intermediate_size": mlp},
        **{"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads},
        **{"head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": bool(tied)},
        **changes,
    }


def training(config: dict[str, Any], lora: Lora | None, **more: Any) -> Training:
    rank, targets = (lora.rank, lora.targets) if lora else (0, ())
    return Training(shapes=Shapes.of(config), rank=rank, targets=targets, **more)


def ran(config: dict[str, Any], lora: Lora | None, checkpointing: bool, tokens: int) -> Measured:
    from transformers import Qwen3Config

    with pytest.MonkeyPatch.context() as patched, as_on_a_gpu(patched):
        made = Qwen3Config(**{name: value for name, value in config.items() if name != "model_type"}, pad_token_id=0)
        return measured(meta_policy(made, lora, checkpointing), tokens)


def equal(planned: Training, found: Measured, checkpointing: bool, tokens: int) -> None:
    assert planned.weights == found.weights
    assert planned.weights + planned.optimiser == pytest.approx(found.held, rel=1e-6)
    assert planned.student(tokens, checkpointing) == pytest.approx(found.micro_batch, rel=0.03)
    assert planned.forward(tokens) == pytest.approx(found.forward, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("size", QWEN3)
def test_bytes_are_those_of_the_policy(size: str, lora: Lora | None, checkpointing: bool) -> None:
    """Four layers as wide as the model's."""
    few = config(size, num_hidden_layers=4)
    equal(training(few, lora), ran(few, lora, checkpointing, 8192), checkpointing, 8192)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1024, 16384])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("size", QWEN3)
def test_bytes_are_those_of_the_whole_policy(size: str, lora: Lora | None, checkpointing: bool, tokens: int) -> None:
    whole = config(size)
    equal(training(whole, lora), ran(whole, lora, checkpointing, tokens), checkpointing, tokens)
