"""Low-rank adapters: W + (alpha / rank) B A, with W frozen (Hu et al. 2021, arXiv 2106.09685).

Files are in peft's format, so that peft and vLLM read them. The layer is our own because of speed: A and B are cast to
the activations' dtype (a few MB a pass), where a peft layer casts every activation to fp32 and back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FROZEN = ("lm_head", "embed_tokens", "wte", "embed_out", "embed_in")
_PEFT_PREFIX = "base_model.model."


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


class LoraLinear(nn.Linear):
    """A frozen linear layer that keeps its weight's name and gains `lora_A` [rank, in] and `lora_B` [out, rank], fp32.

    B starts at zero, so the layer starts as it was. `enabled` False is the layer without its adapter.
    """

    def __init__(self, layer: nn.Linear, lora: Lora) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        fp32 = {"bias": False, "dtype": torch.float32, "device": layer.weight.device}
        self.lora_A = nn.Linear(layer.in_features, lora.rank, **fp32)
        self.lora_B = nn.Linear(lora.rank, layer.out_features, **fp32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.scale = lora.alpha / lora.rank
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)
        a, b = self.lora_A.weight.to(x.dtype), (self.lora_B.weight * self.scale).to(x.dtype)
        out = torch.addmm(linear(rows, self.weight, self.bias), linear(rows, a), b.T)
        return out.unflatten(0, x.shape[:-1])

    def merged(self) -> Tensor:
        """W + scale B A, computed in fp32 and cast to W's dtype. W itself is not touched."""
        with torch.no_grad():
            delta = self.lora_B.weight @ self.lora_A.weight
            return (self.weight.float() + self.scale * delta).to(self.weight.dtype)


def add_adapter(model: nn.Module, lora: Lora) -> None:
    """Freeze `model` and put an adapter beside every linear layer that a target names."""
    model.requires_grad_(False)
    found = {name: layer for name, layer in model.named_modules() if name.rpartition(".")[2] in lora.targets}
    if missing := set(lora.targets) - {name.rpartition(".")[2] for name in found}:
        names = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        raise ValueError(
            f"targets {sorted(missing)} match no layer of the model; its linear layers are {sorted(names)}"
        )
    for name, layer in found.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"target {name} is a {type(layer).__name__}; only linear layers can be adapted")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(layer, lora))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLinear))


def save_adapter(folder: Path, lora: Lora, weights: dict[str, Tensor]) -> None:
    """Write `weights` (named as the model names them) as peft's adapter_model.safetensors and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {_PEFT_PREFIX + name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_adapter(folder: Path, lora: Lora) -> dict[str, Tensor]:
    """The weights of an adapter of the shape `lora`, named as the model names them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    got = (config["r"], config["lora_alpha"], sorted(config["target_modules"]))
    if got != (lora.rank, lora.alpha, sorted(lora.targets)):
        raise ValueError(f"the adapter in {folder} has (rank, alpha, targets) {got}, expected {lora}")
    return {
        name.removeprefix(_PEFT_PREFIX): weight
        for name, weight in load_file(folder / "adapter_model.safetensors").items()
    }
