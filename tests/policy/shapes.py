"""A policy on meta tensors: it has shapes and no values, and takes the path of a GPU. What would that GPU do?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ogls.policy.attention import ATTENTION, register_attention
from ogls.policy.lora import Lora, add_adapter
from ogls.policy.norms import fuse_norms
from ogls.policy.policy import Policy

QWEN3 = {  # hidden size, layers, heads, key heads, width of the MLP
    "0.6b": (1024, 28, 16, 8, 3072),
    "1.7b": (2048, 28, 16, 8, 6144),
    "4b": (2560, 36, 32, 8, 9728),
    "8b": (4096, 36, 32, 8, 12288),
}
_NO_KERNEL = {"detach", "alias", "empty", "empty_like", "new_empty", "lift_fresh"}


def meta_policy(name: str, layers: int | None, lora: Lora | None) -> Policy:
    from transformers import AutoModelForCausalLM, Qwen3Config

    hidden, all_layers, heads, key_heads, mlp = QWEN3[name]
    config = Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers or all_layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=128, tie_word_embeddings=name != "8b",
    )  # fmt: skip
    register_attention()
    policy = Policy(name, lora=lora)
    dtype = torch.float32 if lora is None else torch.bfloat16
    with torch.device("meta"):
        policy.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION).eval()
    fuse_norms(policy.model)
    if lora is not None:
        add_adapter(policy.model, lora)
    policy.model.get_input_embeddings().requires_grad_(False)
    policy._head.requires_grad_(False)
    policy.trunk = lambda **inputs: policy.model.base_model(**inputs)  # meta tensors know no autocast
    return policy


class OnGpu(TorchFunctionMode):
    """What autocast does to linear layers, and norms of one kernel, which torch has for GPUs only."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast
        self.casts: dict[int, Tensor] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.rms_norm:
            return _Norm.apply(args[0], (kwargs or {})["weight"])
        if func is nn.functional.linear and self.autocast:
            x, weight = args[:2]
            if id(weight) not in self.casts:
                self.casts[id(weight)] = weight.to(torch.bfloat16)
            return func(x.to(torch.bfloat16), self.casts[id(weight)])
        return func(*args, **(kwargs or {}))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], device=x.device))
        return torch.ops.aten.relu(x)  # one kernel of this shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.relu(grad), torch.ops.aten.relu(ctx.saved_tensors[1])


class Kernels(TorchDispatchMode):
    """Counts operations that run a kernel, and finds the largest tensor that one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.largest = 0  # elements

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple | list) else out
        name = func.__name__.partition(".")[0]
        if not isinstance(first, Tensor) or first.device.type != "meta" or name in _NO_KERNEL:
            return out
        inputs = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        if func._schema.is_mutable or first.untyped_storage()._cdata not in inputs:  # otherwise it is a view
            self.count[name] += 1
            self.largest = max(self.largest, first.numel())
        return out
