"""Low-rank adapters: W + (alpha / rank) B A, with W frozen (Hu et al. 2021, arXiv 2106.09685).

All of it is peft's but the layer's forward pass, for speed: A and B are cast to the activations' dtype (a few MB a
pass), where peft casts every activation to fp32 and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FROZEN = ("lm_head", "embed_tokens", "wte", "embed_out", "embed_in")
_ADAPTER = "default"  # peft's own name of the only adapter
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Shape of the adapter. `targets` are the last names of linear layers, as in peft. There is no dropout."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ValueError(f"an adapter needs rank >= 1, alpha > 0 and targets, got {self}")
        if isinstance(self.targets, str):
            raise ValueError(f"targets is a list of names, got the string {self.targets!r}")
        if frozen := sorted(set(self.targets) & set(_FROZEN)):
            raise ValueError(f"{frozen} cannot be adapted: student and teacher share embeddings and output head")


@cache
def _layer() -> type[nn.Module]:
    """peft's layer with the fast forward pass; made when it is needed, because peft is slow to import."""
    from peft.tuners.lora import Linear

    class FastLinear(Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters:
                return self.base_layer(x)
            rows = x.flatten(0, -2)
            a: Any = self.lora_A[_ADAPTER].weight.to(x.dtype)
            b = (self.lora_B[_ADAPTER].weight * self.scaling[_ADAPTER]).to(x.dtype)
            return torch.addmm(self.base_layer(rows), linear(rows, a), b.T).unflatten(0, x.shape[:-1])

    return FastLinear


def add_adapter(model: nn.Module, lora: Lora) -> None:
    """Freeze `model` and put an adapter, in fp32 and without effect, beside every linear layer that a target names."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    names = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if missing := set(lora.targets) - names:  # peft is content when one of them matches
        raise ValueError(
            f"targets {sorted(missing)} match no layer of the model; its linear layers are {sorted(names)}"
        )
    alpha: Any = lora.alpha  # an int to peft's type, any number to its code
    config = LoraConfig(task_type="CAUSAL_LM", r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets))
    config._register_custom_module({nn.Linear: _layer()})
    inject_adapter_in_model(config, model, _ADAPTER)
    cast_adapter_dtype(model, _ADAPTER)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """By the names that they have without an adapter."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _layer())}


def merged(layer: Any) -> Tensor:
    """W + scale B A, computed in fp32 and cast to W's dtype. W itself is not touched."""
    with torch.no_grad():
        return (layer.weight.float() + layer.get_delta_weight(_ADAPTER)).to(layer.weight.dtype)


def save_adapter(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the adapter as peft's adapter_model.safetensors and adapter_config.json."""
    from peft import get_peft_model_state_dict

    model.peft_config[_ADAPTER].save_pretrained(folder)
    weights = get_peft_model_state_dict(model).items()
    named = {_PREFIX + name: weight.to("cpu", dtype).contiguous() for name, weight in weights}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model: Any, folder: Path) -> None:
    """Take the weights of an adapter of the same shape."""
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict

    configs: tuple[Any, Any] = LoraConfig.from_pretrained(str(folder)), model.peft_config[_ADAPTER]
    got, expected = ((c.r, c.lora_alpha, sorted(c.target_modules)) for c in configs)
    if got != expected:
        raise ValueError(f"the adapter in {folder} has (rank, alpha, targets) {got}, expected {expected}")
    weights = load_peft_weights(str(folder), device="cpu")
    loaded = set_peft_model_state_dict(model, {name.removeprefix(_PREFIX): w for name, w in weights.items()})
    if odd := [*loaded.unexpected_keys, *(name for name in loaded.missing_keys if ".lora_" in name)]:
        raise ValueError(f"the adapter in {folder} is of another model: not in both: {odd[:4]}")
