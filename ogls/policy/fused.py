"""Fused layers take one kernel on a GPU where transformers takes several.

What is replaced is found by its source code, which has to be that of transformers' Llama: norms (some models add 1 to
the weight), the gated MLP (some cap it), and the rotation of queries and keys (some rotate a part of a head).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

ROTATION = "apply_rotary_pos_emb"  # a function in the module of each model in transformers


def fuse_layers(model: nn.Module) -> None:
    """Has one kernel compute each norm, gate and rotation of a model; what is learned stays the same.

    - norm: x * (mean(x^2) + eps)^-1/2 * weight, torch's own; its output has the dtype of its input also where the
      weight is fp32 and under autocast, which would have norms be fp32 on a GPU
    - gate of the MLP: silu(gate) * up, see `ogls.policy.triton_layer`
    - rotation: x * cos + rotate_half(x) * sin, see `ogls.policy.triton_layer`

    Gate and rotation are transformers' own on a CPU.
    """
    from transformers.models.llama import modeling_llama as llama

    kinds = {type(module) for module in model.modules()}
    norms = {kind for kind in kinds if kind.__name__.endswith("RMSNorm") and _same(kind, llama.LlamaRMSNorm)}
    gated = {kind for kind in kinds if kind.__name__.endswith("MLP") and _same(kind, llama.LlamaMLP)}
    for module in model.modules():
        if type(module) in norms:
            module.forward = MethodType(_norm, module)
        elif type(module) in gated and type(module.act_fn).__name__.startswith("SiLU"):
            module.forward = MethodType(_mlp, module)
    for source in {sys.modules[kind.__module__] for kind in kinds if kind.__name__.endswith("Attention")}:
        own = getattr(source, ROTATION, None)
        if own is None or hasattr(own, "__wrapped__"):  # of an earlier model
            continue
        if inspect.getsource(own) == inspect.getsource(llama.apply_rotary_pos_emb):
            setattr(source, ROTATION, _rotation(own))


def has_kernels(x: Tensor) -> bool:
    """Returns whether gate and rotation of such a tensor are computed by a kernel."""
    return x.device.type != "cpu"


def _same(kind: type[nn.Module], known: type[nn.Module]) -> bool:
    return inspect.getsource(kind.forward) == inspect.getsource(known.forward)


def _norm(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.variance_epsilon)


def _mlp(self: Any, x: Tensor) -> Tensor:
    if not has_kernels(x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    from ogls.policy.triton_layer import swiglu

    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # gate and up are gone before the product


def _rotation(own: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns what takes the place of a model's own function; one row of tokens is all that the kernel knows."""

    @wraps(own)
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not has_kernels(q) or len(q) != 1 or args or kwargs:
            return own(q, k, cos, sin, *args, **kwargs)
        from ogls.policy.triton_layer import rotated

        return rotated(q, cos, sin), rotated(k, cos, sin)

    return rotation
