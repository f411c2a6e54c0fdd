"""Low-rank adapters train W + (alpha / rank) B A with W frozen.

Source: Hu et al. 2021, arXiv 2106.09685. All of it is peft's except the layer's forward pass, which is written anew for
speed: A and B are cast to the activations' dtype (a few MB per pass), where peft casts every activation to fp32 and
back.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from ogls.policy.sharding import whole
from ogls.system.ranges import POSITIVE, check

ALL_LINEAR = "all-linear"
"""These targets are every linear layer but the output head, as in peft."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FROZEN = ("lm_head", "embed_tokens", "wte", "embed_out", "embed_in")
_ADAPTER = "default"  # peft's own name of the only adapter
_PREFIX = "base_model.model."
_READ = {  # or without effect on what a trained adapter computes; layers are compared by their names
    *("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
MERGED_BY_PEFT = frozenset({"use_rslora", "use_dora", "rank_pattern", "alpha_pattern"})
"""These fields change what an adapter computes, and peft heeds them when it merges one."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A Lora is the shape of a low-rank adapter, W + (alpha / rank) B A. There is no dropout.

    Args:
        rank: number of rows of A and of columns of B
        alpha: numerator of the factor alpha / rank of the adapter's product
        targets: last part of the names of the linear layers that get an adapter; ``all-linear`` gives one to every
            linear layer but the output head
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | Literal["all-linear"] = PROJECTIONS

    def __post_init__(self) -> None:
        check(self, {"rank": "[1, 65536]", "alpha": POSITIVE}, "policy.lora")
        if not self.targets:
            raise ValueError("policy.lora.targets needs at least one name, got none")
        if self.targets == ALL_LINEAR:
            return
        if isinstance(self.targets, str):
            raise ValueError(f"targets is a list of names or {ALL_LINEAR!r}, got the string {self.targets!r}")
        if frozen := sorted(set(self.targets) & set(_FROZEN)):
            raise ValueError(f"{frozen} cannot be adapted: student and teacher share embeddings and output head")

    def among(self, names: Iterable[str]) -> tuple[str, ...]:
        """Returns the targets; where they are all linear layers, the `names` of those that a model has."""
        return tuple(dict.fromkeys(names)) if isinstance(self.targets, str) else self.targets


@cache
def _layer() -> type[nn.Module]:
    """Returns peft's layer with a fast forward pass; peft is slow to import, so it waits until it is needed."""
    from peft.tuners.lora import Linear

    class FastLinear(Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters:
                return self.base_layer(x)
            layers: Any = self.lora_A[_ADAPTER], self.lora_B[_ADAPTER]
            a, b = (layer.weight.to(x.dtype) for layer in layers)
            base: Any = self.base_layer
            out = Adapted.apply(x.flatten(0, -2), base.weight, base.bias, a, b, self.scaling[_ADAPTER])
            return out.unflatten(0, x.shape[:-1])

    return FastLinear


class Adapted(torch.autograd.Function):
    """Adapted is y = x W^T + bias + s (x A^T) B^T with a frozen W; what is summed is added to where the first term is.

    With gradient g of y and g' = s g B, the gradients are g W + g' A of x, g'^T x of A, and s g^T (x A^T) of B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:
        low = x @ a.T
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.s = s
        return linear(x, weight, bias).addmm_(low, b.T, alpha=s)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, a, b, low = ctx.saved_tensors
        of_low = scaled_product(grad, b, ctx.s)
        of_x = (grad @ weight).addmm_(of_low, a) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_low.T @ x, scaled_product(grad.T, low, ctx.s), None


def scaled_product(x: Tensor, y: Tensor, s: float) -> Tensor:
    """Returns s x y without a further pass over it."""
    return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=s)


def add_adapter(model: Any, lora: Lora) -> None:
    """Freezes `model` and puts an adapter beside every linear layer that `lora.targets` names.

    The adapter is fp32 and at first has no effect, because B is 0.

    Raises:
        ValueError: a target matches no linear layer of the model.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    linear = {name.rpartition(".")[2]: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    head = model.get_output_embeddings()
    names = {name for name, layer in linear.items() if layer is not head}
    targets = lora.among(sorted(names))
    if missing := set(targets) - names:  # peft complains only if no target matches
        raise ValueError(
            f"targets {sorted(missing)} match no layer of the model; its linear layers are {sorted(names)}"
        )
    alpha: Any = lora.alpha  # an int to peft's type, any number to its code
    config = LoraConfig(task_type="CAUSAL_LM", r=lora.rank, lora_alpha=alpha, target_modules=list(targets))
    config._register_custom_module({nn.Linear: _layer()})
    inject_adapter_in_model(config, model, _ADAPTER)
    cast_adapter_dtype(model, _ADAPTER)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Returns the layers with an adapter, by the names that they have without one."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _layer())}


def merged(layer: Any) -> Tensor:
    """Returns W + (alpha / rank) B A, computed in fp32 and cast to W's dtype; the layer stays as it is."""
    with torch.no_grad():
        return (layer.weight.float() + layer.get_delta_weight(_ADAPTER)).to(layer.weight.dtype)


def save_adapter(model: Any, folder: Path | None, dtype: torch.dtype, base: str) -> None:
    """Writes the adapter as peft's adapter_model.safetensors and adapter_config.json, with weights in `dtype`.

    Args:
        model: model of transformers with the adapter
        folder: folder to write; None only gathers what other processes write
        dtype: dtype of the weights
        base: name or folder of the model that the adapter fits, which peft looks up
    """
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model).items()
    named = {_PREFIX + name: whole(weight).to("cpu", dtype).contiguous() for name, weight in weights}
    if folder is None:
        return
    config = model.peft_config[_ADAPTER]
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def join_adapters(first: Path, second: Path, base: str) -> None:
    """Makes the adapter in `second`, which was trained on a model with the one in `first` merged into it, fit `base`.

    The sum of two products is one of the sum of their ranks: s B A + s' B' A' = [s B, s' B'] [A; A'], with alpha equal
    to the rank. Merging rounded the first sum to the dtype of the base, so it agrees with it to that rounding.

    Args:
        first: folder of the adapter that the training began with
        second: folder of the trained adapter, which is overwritten
        base: name or folder of the model without either
    """
    from peft import LoraConfig, load_peft_weights

    refuse_unread(first, more={"use_rslora"})
    folders = first, second
    configs: list[Any] = [LoraConfig.from_pretrained(str(folder)) for folder in folders]
    weights = [load_peft_weights(str(folder), device="cpu") for folder in folders]
    factors = [c.lora_alpha / (c.r**0.5 if c.use_rslora else c.r) for c in configs]
    layers, rank = {name.rpartition(".lora_")[0] for some in weights for name in some}, sum(c.r for c in configs)
    joined = {}
    for layer in sorted(layers):
        sides: tuple[str, str] = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        parts = [(some, factor) for some, factor in zip(weights, factors, strict=True) if sides[0] in some]
        a = torch.cat([some[sides[0]].float() for some, _ in parts])
        b = torch.cat([factor * some[sides[1]].float() for some, factor in parts], 1)
        rest = rank - len(a)  # above 0 where one of them leaves the layer alone
        joined[sides[0]] = torch.cat([a, a.new_zeros(rest, a.shape[1])])
        joined[sides[1]] = torch.cat([b, b.new_zeros(len(b), rest)], 1)
    whole = configs[1]
    whole.r, whole.lora_alpha, whole.base_model_name_or_path = rank, rank, base
    whole.target_modules = sorted({layer.rpartition(".")[2] for layer in layers})
    whole.save_pretrained(second)
    save_file(joined, second / "adapter_model.safetensors", metadata={"format": "pt"})


def refuse_unread(folder: Path, more: Collection[str] = ()) -> None:
    """Raises ValueError if the adapter in `folder` is more than W + (alpha / rank) B A beside some linear layers.

    Every field of its configuration must be one that is read, or be off. Adapters of embeddings and output head are
    refused, since the head may be tied to the embeddings.

    Args:
        folder: folder of an adapter in peft's format
        more: further fields that whoever calls this reads
    """
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    off = {"bias": "none", "peft_type": "LORA"}
    for name, value in config.items():
        read = name in _READ or name in more or (name == "init_lora_weights" and value in (True, False, "gaussian"))
        if not read and (value != off[name] if name in off else value):
            raise ValueError(
                f"the adapter in {folder} has {name}: {value!r}, which is not read: train it without, or merge it with "
                "peft and set policy.model to the result"
            )
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        parts = {part for name in tensors.keys() for part in name.split(".")}  # noqa: SIM118 - not a dict
    if frozen := sorted(parts & set(_FROZEN)):
        raise ValueError(
            f"the adapter in {folder} has target_modules that reach {frozen[0]}: the output head may be tied to the "
            "embeddings, train it without"
        )


def load_adapter(model: Any, folder: Path) -> None:
    """Gives the model's adapter the weights of the one in `folder`.

    Raises:
        ValueError: the two differ in rank, alpha or targets, belong to different models, or see `refuse_unread`.
    """
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict

    refuse_unread(folder)
    configs: tuple[Any, Any] = LoraConfig.from_pretrained(str(folder)), model.peft_config[_ADAPTER]
    got, expected = ((c.r, c.lora_alpha, sorted(c.target_modules)) for c in configs)
    if got != expected:
        raise ValueError(f"the adapter in {folder} has (rank, alpha, targets) {got}, expected {expected}")
    weights = load_peft_weights(str(folder), device="cpu")
    loaded = set_peft_model_state_dict(model, {name.removeprefix(_PREFIX): w for name, w in weights.items()})
    if odd := [*loaded.unexpected_keys, *(name for name in loaded.missing_keys if ".lora_" in name)]:
        raise ValueError(f"the adapter in {folder} is of another model: not in both: {odd[:4]}")
