"""The student: a causal language model as a trunk that gives hidden states, and the output head beside it.

Logits are never made here: the head is linear, so the objective combines hidden states and applies it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from ogls.policy.attention import ATTENTION, register_attention
from ogls.policy.lora import Lora, adapted_layers, add_adapter, load_adapter, merged, save_adapter
from ogls.policy.packing import pack
from ogls.policy.pretrained import quiet_transformers

Dtype = Literal["bfloat16", "float32"]


class Policy(nn.Module):
    """A model folder with trainable weights: a fresh adapter, or all weights but embeddings and output head.

    With `lora`, the base is held in `dtype` and the adapter in fp32. Without, all weights are fp32 and the pass runs
    under autocast when `dtype` is bfloat16. Dropout is never active: student and teacher are one function.
    """

    def __init__(
        self,
        path: Path | str,
        lora: Lora | None = None,
        dtype: Dtype = "bfloat16",
        gradient_checkpointing: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        quiet_transformers()
        register_attention()
        self.path, self.lora, self.dtype = Path(path), lora, dtype
        self._autocast = lora is None and dtype == "bfloat16"
        loaded = torch.float32 if lora is None else _TORCH[dtype]
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=loaded, attn_implementation=ATTENTION)
        self.model.eval()
        if lora is not None:
            add_adapter(self.model, lora)
        self.model.get_input_embeddings().requires_grad_(False)
        self._head.requires_grad_(False)
        if gradient_checkpointing:
            _checkpoint_layers(self.model)
        self._refuse_non_linear_head()

    def hidden(
        self,
        prefixes: Sequence[Sequence[int]],
        suffixes: Sequence[Sequence[int]],
        owners: Sequence[int],
        share_prefixes: bool = True,
    ) -> Float[Tensor, "suffix_tokens d"]:
        """Final-norm states that predict each token of `suffixes[i]` after `prefixes[owners[i]]`, in suffix order.

        A prefix that several suffixes own is run once; `share_prefixes` False runs it once for each.
        """
        device = self.head[0].device
        packing = pack(
            prefixes,
            suffixes,
            owners,
            share_prefixes=share_prefixes,
            device=device,
            dtype=_TORCH[self.dtype],
        )
        # Four axes tell transformers that the mask is ready-made; the packing is what the attention goes by.
        no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        states = self.trunk(
            input_ids=packing.token_ids[None],
            position_ids=packing.position_ids[None],
            attention_mask=no_mask,
            use_cache=False,
            packing=packing,
        ).last_hidden_state[0]
        return states.index_select(0, packing.predicting)

    def trunk(self, **inputs: Any) -> Any:
        """The model without its head, in the policy's arithmetic; arguments and output are transformers' own."""
        with torch.autocast(self.head[0].device.type, torch.bfloat16, enabled=self._autocast):
            return self.model.base_model(**inputs)

    @property
    def head(self) -> tuple[Float[Tensor, "vocab d"], Float[Tensor, " vocab"] | None]:
        """Weight and bias of the frozen output head: logits = states @ weight.T + bias."""
        return self._head.weight, self._head.bias

    @property
    def _head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"{self.model.config.model_type} has no linear output head: got {type(head).__name__}")
        return head

    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights that training changes, by the model's own names; always the same set in the same order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the policy is the model it was started from. Needs an adapter."""
        if self.lora is None:
            raise ValueError("without_adapter needs a policy with an adapter; this one trains full weights")
        layers = adapted_layers(self.model).values()
        for layer in layers:
            layer._disable_adapters = True  # the flag alone: peft's own ways of setting it change requires_grad too
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Inside, the trainable weights are those training began with: an adapter of zeros, or the folder's values.

        Unlike `without_adapter` this is also seen by whoever copies weights or adapter, as engines do.
        """
        zeros = {name: torch.zeros_like(p) for name, p in self.trainable().items()} if self.lora else None
        with self.swapped(self.folder_weights() if zeros is None else zeros):
            yield

    @contextmanager
    def swapped(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Inside, the trainable weights hold the values of `weights`, which has the same names."""
        own = self.trainable()
        kept = {name: p.data for name, p in own.items()}
        for name, p in own.items():
            p.data = weights[name].to(p.device, p.dtype)
        try:
            yield
        finally:
            for name, p in own.items():
                p.data = kept[name]

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What can have changed, named as in the folder's safetensors, in `dtype`. The base stays as it is.

        With an adapter, what stands beside an adapted layer comes along: engines fuse q, k, v and cannot take q alone.
        """
        adapted = adapted_layers(self.model) if self.lora else {}
        layers = {f"{name}.weight": layer for name, layer in adapted.items()}
        blocks = {name.rsplit(".", 2)[0] for name in layers}
        for name, p in self.model.named_parameters():
            name = name.replace(".base_layer.", ".")
            if name in layers:
                yield name, merged(layers[name])
            elif p.requires_grad if self.lora is None else name.rsplit(".", 2)[0] in blocks:
                yield name, p.detach().to(_TORCH[self.dtype])

    def folder_weights(self) -> dict[str, Tensor]:
        """The values that the trainable weights have in the folder; only for full weights."""
        names = self.trainable().keys()
        found = {}
        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.keys() if name in names}  # noqa: SIM118
        if missing := sorted(names - found.keys()):
            raise ValueError(f"{self.path} lacks {len(missing)} of the trainable weights, such as {missing[0]}")
        return found

    def save_adapter(self, folder: Path | str) -> None:
        """Write the adapter in peft's format, in the policy's dtype: a merge rounds to it anyway."""
        self._refuse_full_weights()
        save_adapter(self.model, Path(folder), _TORCH[self.dtype])

    def load_adapter(self, folder: Path | str) -> None:
        """Take the weights of an adapter of the same shape, written by `save_adapter` or by peft."""
        self._refuse_full_weights()
        load_adapter(self.model, Path(folder))

    def load_trainable(self, weights: dict[str, Tensor]) -> None:
        """Copy `weights` into the trainable weights; names and shapes must be the same."""
        own = self.trainable()
        if own.keys() != weights.keys():
            odd = sorted(own.keys() ^ weights.keys())
            raise ValueError(f"expected the {len(own)} trainable weights, got {len(weights)}; not in both: {odd[:4]}")
        with torch.no_grad():
            for name, p in own.items():
                if p.shape != weights[name].shape:
                    raise ValueError(f"{name} has the shape {tuple(weights[name].shape)}, expected {tuple(p.shape)}")
                p.copy_(weights[name])

    def train(self, mode: bool = True) -> Policy:
        """Nothing to switch: the policy has no dropout, whoever calls `train` or `eval` on a module around it."""
        return self

    def _refuse_full_weights(self) -> None:
        if self.lora is None:
            raise ValueError("this policy trains full weights and has no adapter to save or load")

    def _refuse_non_linear_head(self) -> None:
        """Compare the model's own logits with head(hidden): soft-capping, scaling or another attention would show."""
        config = self.model.config
        if getattr(config, "final_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None):
            raise ValueError(f"{config.model_type} soft-caps its logits, so its head is not linear: not supported")
        ids = [(i + 1) * (config.vocab_size // 14) for i in range(12)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            expected = self.model(input_ids=torch.tensor([ids])).logits[0, 3:-1]
            got = self._head(self.hidden([ids[:4]], [ids[4:], ids[4:6]], [0, 0])[:8])
        off = float((got - expected).abs().mean() / expected.abs().mean())
        if off > 0.1:
            raise ValueError(f"the logits of {config.model_type} are {off:.0%} off head(last states): not supported")


_TORCH = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _checkpoint_layers(model: Any) -> None:
    """Recompute each layer in the backward pass. transformers does so only in layers that believe they are training."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
