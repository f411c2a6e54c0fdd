"""A GPU that is not there: the trainer's own code on meta tensors, which have shapes and no values.

    with FakeGpu() as gpu:
        policy = gpu.policy(config, Lora(rank=64), checkpointing=True)
        policy.hidden(prefixes, suffixes, owners)
    gpu.peak, gpu.kernels, gpu.seconds

Bytes, FLOP, kernels and waits are exact for the code. Seconds are a model: a kernel takes as long as its arithmetic,
its memory traffic or its launch, whichever is longest, at the rates of `Rates`, and one runs after the other. Where a
GPU has one kernel and meta tensors take the long way, the kernel is stood in for: norms, the loss's passes over rows,
the cast of weights under autocast.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ogls.loss import alpha_bound, chunked, tiles
from ogls.policy import fused, packing
from ogls.policy.attention import ATTENTION, register_attention
from ogls.policy.layout import Varlen
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy

META = torch.device("meta")
_NO_KERNEL = {"detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh"}
_ATTENTION = {"_varlen_attn": 1.0, "_varlen_attn_backward": 2.5}  # products beside those of the forward pass


QWEN3 = {  # width of the states, layers, query and key heads, width of the MLP, whether the head is the embeddings
    "0.6B": (1024, 28, 16, 8, 3072, True),
    "1.7B": (2048, 28, 16, 8, 6144, True),
    "4B": (2560, 36, 32, 8, 9728, True),
    "8B": (4096, 36, 32, 8, 12288, False),
}


def qwen3(size: str, **changes: Any) -> dict[str, Any]:
    """Returns what stands in the config.json of a Qwen3."""
    hidden, layers, heads, kv_heads, mlp, tied = QWEN3[size]
    return {
        **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": hidden, "intermediate_size": mlp},
        **{"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads},
        **{"head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": tied, "pad_token_id": 0},
        **changes,
    }


@dataclass(frozen=True)
class Rates:
    """Rates are what one GPU reaches; those of an H100 are the default.

    Products and attention are as measured on an H200, which has the same processor. Memory is 7/8 of the vendor's
    figure, as measured there (4.2 of 4.8 TB/s).

    Args:
        flops: FLOP/s of bf16 products
        flops_fp32: FLOP/s of fp32 products
        attention: FLOP/s of flash attention
        bandwidth: bytes/s of its memory
        launch: seconds that a kernel takes at least
    """

    flops: float = 7.3e14
    flops_fp32: float = 5.0e13
    attention: float = 2.9e14
    bandwidth: float = 2.9e12
    launch: float = 2e-6


class FakeGpu(TorchDispatchMode):
    """A fake GPU counts what the code inside its context would have a GPU do."""

    def __init__(self, rates: Rates = Rates()) -> None:
        super().__init__()
        self.rates = rates
        self.live = self.peak = 0  # bytes
        self.kernels: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.waits = 0  # times that the program waits for a number
        self.largest = 0  # elements of the largest tensor
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._pairs: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._autocast = _Autocast()

    def reset(self) -> None:
        """Begins to count anew; what is alive stays, and is the first peak."""
        gc.collect()
        self.kernels.clear(), self.seconds.clear(), self.flops.clear()
        self.waits, self.largest, self.peak = 0, 0, self.live

    def __enter__(self) -> FakeGpu:
        self._patches = self._patched()
        self._patches.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.__exit__(*error)

    @contextmanager
    def _patched(self) -> Iterator[None]:
        real = packing.layout

        def layout(*args: Any) -> Any:
            made = real(*args)
            if isinstance(made, Varlen):
                roots, branches, owners = args[:3]
                pairs = sum(n * (n + 1) // 2 for n in (*roots, *branches))
                pairs += sum(n * roots[owner] for n, owner in zip(branches, owners, strict=True))
                self._pairs[made.query_starts.untyped_storage()] = pairs
            return made

        with (
            mock.patch.object(packing, "layout", layout),
            mock.patch.object(fused, "rms_norm", lambda x, _, weight, __: _Norm.apply(x, weight)),
            mock.patch.object(torch.nn.functional, "linear", self._autocast.linear),
            mock.patch.dict(tiles.CHUNK_BYTES, meta=tiles.CHUNK_BYTES["cuda"]),
            mock.patch.dict(tiles.TILE_BYTES, meta=tiles.TILE_BYTES["cuda"]),
            mock.patch.object(chunked, "passes", self._row_passes),
            mock.patch.object(alpha_bound, "_passes", return_value=self._budget_passes),
        ):
            yield

    # ---- kernels that Triton has, and meta tensors have not ----

    def _row_passes(
        self, divergence: Any, support: Any, device: Any, dtype: Any, **options: Any
    ) -> Callable[..., None]:
        closed = type(divergence).__name__ in ("ForwardKL", "ReverseKL") and options["clip"] is None
        reads = 3 if support is not None else 2 if closed else 3

        def run(logits: Tensor, gaps: Tensor, *_: Any) -> None:
            row = logits.numel() * logits.itemsize
            self._charge("rows of the loss", 0, 2 * reads * row + options["wants_gradient"] * row)

        return run

    def _budget_passes(self, logits: Tensor, deltas: Tensor, alphas: Tensor) -> None:
        self._charge("KL budget", 0, 2 * (alpha_bound.HALVINGS + 3) * logits.numel() * logits.itemsize)

    # ---- everything else ----

    def policy(self, config: dict[str, Any], lora: Lora | None, checkpointing: bool = False) -> Policy:
        """Returns the policy of a model of which there is a config.json alone; its weights count as alive."""
        from transformers import AutoConfig, AutoModelForCausalLM

        policy = Policy("none", lora=lora, gradient_checkpointing=checkpointing)
        register_attention()
        with META:
            dtype = torch.float32 if lora is None else torch.bfloat16
            made = AutoConfig.for_model(**config)
            policy.take(AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=ATTENTION))
        policy.trunk = self._autocast.trunk_of(policy)
        for p in policy.parameters():
            self._track(p)
        gc.collect()
        return policy

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "meta"
        if there and function is torch.ops.aten._local_scalar_dense.default:
            self.waits += 1
            return 1.0
        if there and function is torch.ops.aten.nonzero.default:  # as if nothing were 0
            self.waits += 1
            return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device=args[0].device)
        out = function(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.device.type == "meta"]
        for x in outputs:
            self._track(x)
        name = function.__name__.partition(".")[0]
        storages = {x.untyped_storage()._cdata for x in inputs}
        is_view = not function._schema.is_mutable and all(x.untyped_storage()._cdata in storages for x in outputs)
        if outputs and name not in _NO_KERNEL and not is_view:
            self.largest = max(self.largest, *(x.numel() for x in outputs))
            self._charge(*self._cost(name, function._schema.is_mutable, args, inputs, outputs))
        return out

    def _cost(
        self, name: str, in_place: bool, args: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> tuple[str, float, float]:
        """Returns the name of an operation, its FLOP and its bytes."""
        if name in _ATTENTION:
            heads, size = inputs[0].shape[-2:]
            pairs = next(self._pairs[s] for x in inputs if (s := x.untyped_storage()) in self._pairs)
            return name, 4 * _ATTENTION[name] * heads * size * pairs, 0
        if name in ("mm", "addmm"):
            a, b = args[:2] if name == "mm" else args[1:3]
            kind = f"{name} fp32" if a.dtype == torch.float32 else name
            return kind, 2 * a.shape[0] * a.shape[1] * b.shape[1], sum(map(_bytes, (a, b, *outputs)))
        if name in ("index_select", "index", "gather", "embedding"):
            return name, 0, 2 * sum(map(_bytes, outputs))
        return name, 0, sum(map(_bytes, inputs)) + (0 if in_place else sum(map(_bytes, outputs)))

    def _charge(self, name: str, flops: float, nbytes: float) -> None:
        rates = self.rates
        rate = rates.attention if name in _ATTENTION else rates.flops_fp32 if name.endswith("fp32") else rates.flops
        self.kernels[name] += 1
        self.flops[name] += int(flops)
        self.seconds[name] += max(flops / rate, nbytes / rates.bandwidth, rates.launch)  # pyright: ignore[reportArgumentType]

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size


def _bytes(x: Tensor) -> int:
    """Returns the bytes of what a tensor has in memory; an expanded one is read once."""
    numbers = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers * x.itemsize


class _Autocast:
    """What autocast does to linear layers whose weights are fp32.

    The casts of weights live until the pass ends; layers that the backward pass computes anew are passes of their own.
    """

    def __init__(self) -> None:
        self._linear = torch.nn.functional.linear
        self._casts: dict[int, Tensor] = {}
        self._inside = False

    def trunk_of(self, policy: Policy) -> Callable[..., Any]:
        def trunk(**inputs: Any) -> Any:
            self._inside = True
            try:
                return policy.model.base_model(**inputs)
            finally:
                self._inside = False
                self._casts.clear()

        return trunk

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dtype == torch.float32:
            cast = self._casts.get(id(weight))
            cast = weight.to(torch.bfloat16) if cast is None else cast
            if self._inside:
                self._casts[id(weight)] = cast
            x, weight = x.to(torch.bfloat16), cast
        return self._linear(x, weight, bias)


class _Norm(torch.autograd.Function):
    """A norm as a GPU's kernel makes it: it keeps its input, and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], device=x.device))
        return x.relu()  # any kernel of this shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        _, weight, _ = ctx.saved_tensors
        return grad.relu(), weight.relu() if ctx.needs_input_grad[1] else None
