"""The product's own policy on meta tensors, and a count of the bytes that live there: what a GPU would hold.

A test sees exact bytes of every allocation, without a GPU and without the weights of a model. What no meta tensor can
do is stood in for: fused attention saves what a GPU's kernel saves, autocast casts the inputs of linear layers.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ogls.policy import attention, packing
from ogls.policy import policy as module
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy

META = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all meta storages that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" and storage not in self._known:
            self._known[storage] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.track(leaf)
        return out


class Autocast:
    """Casts inputs and weights of linear layers to bf16; the casts of weights live until the pass ends, as autocast's.

    Layers that the backward pass computes anew are passes of their own.
    """

    def __init__(self) -> None:
        self._linear, self._casts, self._inside = torch.nn.functional.linear, [], False

    def trunk(self, policy: Policy, **inputs: Any) -> Any:
        self._inside = True
        try:
            return policy.model.base_model(**inputs)
        finally:
            self._casts, self._inside = [], False

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dtype == torch.float32:
            x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
            self._casts += [weight] * self._inside
        return self._linear(x, weight, bias)


class _Fused(torch.autograd.Function):
    """Fused attention, which keeps its inputs, its output, and one number per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])  # pyright: ignore[reportReturnType]


def _attended(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return _Fused.apply(*(x.to(torch.bfloat16) for x in (q, k, v)))


def _packed(*args: Any, device: torch.device, **options: Any) -> packing.Packing:
    made = packing.pack(*args, device=torch.device("cpu"), **options)
    assert made.branches is None, "of branches this count knows nothing"

    def moved(x: Tensor) -> Tensor:
        return torch.empty_like(x, device=device)

    roots = replace(made.roots, cells=moved(made.roots.cells), tokens=moved(made.roots.tokens))
    tensors = {name: moved(getattr(made, name)) for name in ("token_ids", "position_ids", "predicting", "owners")}
    return replace(made, roots=roots, **tensors)


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Meta tensors take the way of a GPU's through the policy while this context is entered."""

    autocast = Autocast()
    monkeypatch.setattr(torch.nn.functional, "linear", autocast.linear)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", _attended)
    monkeypatch.setattr(packing, "rounded_up", lambda size, device: size)
    monkeypatch.setattr(module, "pack", _packed)
    monkeypatch.setattr(Policy, "trunk", lambda self, **inputs: autocast.trunk(self, **inputs))
    gc.collect()
    yield


def meta_policy(config: Any, lora: Lora | None, checkpointing: bool) -> Policy:
    """The policy of a model of which there is a config alone."""
    from transformers import AutoModelForCausalLM

    policy = Policy("none", lora=lora, gradient_checkpointing=checkpointing)
    module.register_attention()
    dtype = torch.float32 if lora is None else torch.bfloat16
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.ATTENTION)
        policy.take(model)
    return policy


@dataclass(frozen=True)
class Measured:
    """Bytes of a policy: its weights, with gradients and optimiser, and at most beside them in a second micro-batch."""

    weights: int
    held: int
    micro_batch: int
    forward: int


def measured(policy: Policy, tokens: int) -> Measured:
    """Two passes with their gradients over sequences of a prompt each, an update between them, a pass without."""
    prefixes, suffixes, owners = [[1] * 100] * 4, [[1] * (tokens // 4 - 99)] * 4, list(range(4))
    with LiveBytes() as count:
        for p in policy.parameters():
            count.track(p)
        weights = count.live
        optimizer = torch.optim.AdamW(policy.trainable().values())
        _passed(policy, prefixes, suffixes, owners)
        optimizer.step()
        held = count.peak = count.live
        _passed(policy, prefixes, suffixes, owners)
        micro_batch = count.peak - held
        assert count.live == held
        optimizer.zero_grad()
        count.peak = held = count.live
        with torch.no_grad(), nullcontext() if policy.lora is None else policy.without_adapter():
            policy.hidden(prefixes, suffixes, owners)
        return Measured(
            weights, held + sum(4 * p.numel() for p in policy.trainable().values()), micro_batch, count.peak - held
        )


def _passed(policy: Policy, *sequences: Any) -> None:
    states = policy.hidden(*sequences)
    states.backward(torch.empty_like(states))
