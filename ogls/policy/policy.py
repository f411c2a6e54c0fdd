"""The policy is the student: a model that gives hidden states, and its head.

Logits are never made here. The output head is linear, so the loss combines hidden states and applies the head once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ogls.loss.chunked import Head
from ogls.policy.attention import ATTENTION, register_attention
from ogls.policy.fused import fuse_layers
from ogls.policy.lora import Lora, adapted_layers, add_adapter, load_adapter, merged, save_adapter
from ogls.policy.packing import pack
from ogls.policy.pretrained import (
    EMBEDDED,
    hollow_model,
    load_tokenizer,
    local_folder,
    quiet_transformers,
    resolve_model,
    write_model,
)
from ogls.policy.sharding import cut, outlast, own_part, shard, whole
from ogls.system.process_group import ProcessGroup

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Dtype = Literal["bfloat16", "float32"]
Item = TypeVar("Item")


class Policy(nn.Module):
    """A policy is a language model with trainable weights: a fresh adapter, or all but embeddings and output head.

    With `lora`, the model is held in `dtype` and the adapter in fp32. Without, the weights that are trained are fp32,
    and the pass runs under autocast if `dtype` is bfloat16; embeddings and head are frozen, and held in `dtype`, unless
    they are trained, too.
    Dropout is never active, so that student and teacher are the same function.

    Training and sampling share one policy. Its `version` is the number of updates that its weights have had, and no
    other object counts them. The constructor is light; `load` reads the weights.

    Args:
        model: name of the embedded model, folder, or Hub id. Folders are looked up in the working directory, then in
            the project's.
        adapter: folder of a peft adapter that is merged into the model before training begins (a cold start); null
            merges none. It is looked up as the model's folder is.
        lora: shape of the adapter that is trained; null trains all weights but embeddings and output head
        train_embeddings: whether embeddings and output head are trained, too; only without an adapter
        dtype: dtype of the computation, and of the weights that are not trained
        gradient_checkpointing: whether the backward pass computes activations anew instead of keeping them; this saves
            memory and costs time. ``auto`` does so where the memory plan of a GPU says so, and never on a CPU.
    """

    model: Any
    """The model of transformers, once it is loaded."""

    parts: ProcessGroup | None = None
    """The processes among which the weights are cut (`ogls.policy.sharding`), which make every pass together."""

    def __init__(
        self,
        model: str = "smollm2-135m-instruct",
        adapter: str | None = None,
        lora: Lora | None = Lora(),
        train_embeddings: bool = False,
        dtype: Dtype = "bfloat16",
        gradient_checkpointing: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if train_embeddings and lora is not None:
            raise ValueError("policy.train_embeddings trains all weights: set policy.lora to null")
        self.name, self.adapter, self.lora, self.train_embeddings = model, adapter, lora, train_embeddings
        self.dtype: Dtype = dtype
        self.gradient_checkpointing: bool | Literal["auto"] = gradient_checkpointing
        self.version = 0
        self._autocast = lora is None and dtype == "bfloat16"
        self._lent = self._outlasting = False
        self._short: str | None = None  # what was said when memory ran out amid a pass that was made to its end

    @cached_property
    def folder(self) -> Path:
        """Returns the folder of config, safetensors and tokenizer that trainer and engine read."""
        return resolve_model(self.name, None if self.adapter is None else str(self.adapter_folder))

    @property
    def adapter_folder(self) -> Path:
        """Returns the folder of the adapter that is merged into the model before training begins."""
        found = local_folder(self.adapter or "")
        if found is None:
            raise ValueError(f"policy.adapter: no folder {self.adapter!r} in the working directory or the project")
        return found

    @cached_property
    def base(self) -> str:
        """Returns where others find the model without any adapter: its Hub id, or else its folder."""
        known = self.name == EMBEDDED or local_folder(self.name) is not None
        return str(resolve_model(self.name)) if known else self.name

    @cached_property
    def tokenizer(self):  # a named type would make jsonargparse import transformers for --help
        """Returns the tokenizer of the folder, with its chat template."""
        return load_tokenizer(self.folder)

    def load(self, mesh: DeviceMesh | None = None) -> Policy:
        """Reads the weights at the first call, and returns the policy.

        Args:
            mesh: processes among which the weights are cut: each reads its rows alone; None reads all rows

        Raises:
            ValueError: the model's logits are not a linear function of its last states, or a target of `lora` matches
                no layer.
        """
        from transformers import AutoModelForCausalLM

        if "model" in self._modules:
            return self
        quiet_transformers()
        register_attention()
        attention = {"attn_implementation": ATTENTION}
        if mesh is None:
            loaded = torch.float32 if self._autocast else _TORCH[self.dtype]
            self.take(AutoModelForCausalLM.from_pretrained(self.folder, dtype=loaded, **attention))
        else:
            self.take(hollow_model(self.folder, dtype=_TORCH[self.dtype], **attention))
            self._cut(mesh)
        self._refuse_non_linear_head()
        return self

    def _cut(self, mesh: DeviceMesh) -> None:
        """Cuts a model without values among processes, and reads the own rows of its weights."""
        outlast(self.model.base_model.layers, self._noted)
        shard(self, mesh, ("trunk", "_logits"), torch.bfloat16 if self._autocast else None)
        self._apply(lambda p: p.float() if p.requires_grad else p)  # what is trained is fp32, by rows from the start
        self.parts = ProcessGroup(mesh.get_local_rank(), mesh.size())
        values = {name.replace(".base_layer.", "."): p for name, p in self.model.named_parameters()}
        values = {name: p for name, p in values.items() if ".lora_" not in name}
        with torch.no_grad():
            for name, value in self._stored(values.keys()):
                own_part(values[name]).copy_(own_part(cut(value, values[name])))

    def take(self, model: Any) -> None:
        """Makes a policy of a model of transformers: adds the adapter, freezes embeddings and output head."""
        self.model = model.eval()
        fuse_layers(model)
        if self.lora is not None:
            add_adapter(model, self.lora)
        for end in (model.get_input_embeddings(), self._head):
            if not self.train_embeddings:
                end.requires_grad_(False).to(_TORCH[self.dtype])
        if self.train_embeddings:
            model.get_input_embeddings().register_forward_hook(lambda module, ids, out: out.to(_TORCH[self.dtype]))
        if self.gradient_checkpointing is True:
            _checkpoint_layers(model)

    def checkpoint(self) -> None:
        """Has the backward pass compute activations anew from now on."""
        self.gradient_checkpointing = True
        _checkpoint_layers(self.model)

    def in_step(self, items: Iterable[list[Item]]) -> Iterator[list[Item]]:
        """Yields the items, and empty ones while another process that holds a part of the weights has more."""
        own = list(items)
        most = max(self.parts.gathered(len(own))) if self.parts else len(own)
        yield from own
        yield from ([] for _ in range(most - len(own)))

    def idle(self) -> Float[Tensor, "0 d"]:
        """Makes a pass over one token, in which other processes need this one's part, and returns no states."""
        return self.hidden([[0]], [[0]], [0])[:0]

    @contextmanager
    def agreed_memory(self) -> Iterator[None]:
        """If memory runs out in one process while this context is entered, it does so in all that hold parts.

        So it does where it ran out before, amid a pass while `outlasting` was entered.

        Raises:
            OutOfMemory: memory ran out here or elsewhere.
        """
        if self.parts is None:
            yield
            return
        short: Exception | None = None
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            short = error
        if any(self.parts.gathered(short is not None or self._short is not None)):
            raise OutOfMemory("memory ran out in one of the processes that hold the weights") from short

    @contextmanager
    def outlasting(self) -> Iterator[None]:
        """A pass goes on where memory runs out in a layer while this context is entered; its states mean nothing.

        Others wait for this process in every layer of a pass. Before its states are used, `agreed_memory` has all of
        them know. The gradient's pass is another matter: whatever fails there is raised.
        """
        self._outlasting, self._short = True, None
        try:
            yield
        finally:
            self._outlasting, self._short = False, None

    def _noted(self, error: Exception) -> bool:
        """Returns whether a layer's error is one that the pass outlasts, and remembers it."""
        amid_gradient = torch._C._current_graph_task_id() != -1
        if not self._outlasting or amid_gradient or not out_of_memory(error):
            return False
        self._short = str(error)
        return True

    def let_go(self) -> None:
        """Gives back the memory of weights that a pass has gathered from other processes and left in place."""
        if isinstance(self, FSDPModule):
            self.reshard()

    def recover(self) -> None:
        """Forgets a pass that an exception ended."""
        if isinstance(self, FSDPModule):
            self.reset_iter_state()

    def hidden(
        self,
        prefixes: Sequence[Sequence[int]],
        suffixes: Sequence[Sequence[int]],
        owners: Sequence[int],
        share_prefixes: bool = True,
    ) -> Float[Tensor, "suffix_tokens d"]:
        """Returns the final-norm states that predict each token of the suffixes, one suffix after the other.

        Args:
            prefixes: token ids of each prefix
            suffixes: token ids of each suffix
            owners: number of the prefix that each suffix continues
            share_prefixes: whether a prefix with several suffixes is run once; otherwise it is run once per suffix
        """
        device = self.device
        packing = pack(
            prefixes,
            suffixes,
            owners,
            share_prefixes=share_prefixes,
            device=device,
            dtype=_TORCH[self.dtype],
        )
        # A mask of four axes keeps transformers from making one; the attention follows the packing.
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
        """Returns the output of the model without its head; arguments and output are those of transformers."""
        with torch.autocast(self.device.type, torch.bfloat16) if self._autocast else nullcontext():
            return self.model.base_model(**inputs)

    def _logits(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.model(input_ids=ids).logits

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights."""
        return self._head.weight.device

    @property
    def head(self) -> Head:
        """Returns weight and bias of the output head, in the policy's `dtype`: logits = states @ weight.T + bias.

        Where weights are cut, all processes have to ask for it, unless there was a pass since weights were changed.
        """
        if isinstance(self, FSDPModule):
            self.unshard()
        weight, bias = self._head.weight, self._head.bias
        if not self.train_embeddings:
            return weight, bias
        return weight.to(_TORCH[self.dtype]), None if bias is None else bias.to(_TORCH[self.dtype])

    @property
    def lent_head(self) -> Head | None:
        """Returns the head of the weights that are lent to the policy; None where it is the student's own."""
        if not (self._lent and self.train_embeddings):
            return None
        weight, bias = self.head  # of memory that changes when the student's weights are back
        return weight.detach().clone(), None if bias is None else bias.detach().clone()

    @property
    def _head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"{self.model.config.model_type} has no linear output head: got {type(head).__name__}")
        return head

    @property
    def adapter_rank(self) -> int:
        """Returns the rank of the adapter that is trained; 0 without one."""
        return self.lora.rank if self.lora else 0

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns the weights that training changes, by the model's names, always in the same order."""
        self.let_go()
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The policy computes without its adapter while this context is entered.

        Raises:
            ValueError: the policy has no adapter.
        """
        if self.lora is None:
            raise ValueError("without_adapter needs a policy with an adapter; this one trains full weights")
        layers = adapted_layers(self.model).values()
        for layer in layers:
            layer._disable_adapters = True  # the flag alone: peft's functions for it change requires_grad, too
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """The policy is version 0 while this context is entered: its adapter is 0, or its weights are the folder's.

        Unlike `without_adapter`, this changes the weights themselves, so that an engine that copies them has version 0.
        """
        zeros = {name: torch.zeros_like(p) for name, p in self.trainable().items()} if self.lora else None
        with self.swapped(self.folder_weights() if zeros is None else zeros, version=0):
            yield

    @contextmanager
    def swapped(self, weights: dict[str, Tensor], version: int | None = None) -> Iterator[None]:
        """The trainable weights have other values while this context is entered.

        Args:
            weights: values by the names of `trainable`, in any dtype that the pass can compute with
            version: version of the policy meanwhile; None leaves it as it is
        """
        own, kept_version = self.trainable(), self.version
        if self.parts is None:
            kept = {name: p.data for name, p in own.items()}
            for name, p in own.items():
                p.data = weights[name].to(p.device)
        else:  # a pass gathers from memory that is FSDP's, into which the values have to go
            kept = {name: own_part(p.detach()).clone() for name, p in own.items()}
            self._fill(weights)
        self.version, self._lent = kept_version if version is None else version, True
        try:
            yield
        finally:
            self.version, self._lent = kept_version, False
            for name, p in self.trainable().items():
                if self.parts is None:
                    p.data = kept[name]
                else:
                    own_part(p.detach()).copy_(kept[name])

    @torch.no_grad()
    def _fill(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.trainable().items():
            own_part(p).copy_(own_part(cut(weights[name], p)))

    def parted(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns whole values of trainable weights, cut among the processes as the weights are."""
        own = self.trainable()
        return {name: cut(value, own[name]) if name in own else value for name, value in weights.items()}

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields names and values of the weights that training can have changed, with the adapter merged into them.

        The names are those in the folder's safetensors, the values have the policy's `dtype`, and the policy stays as
        it is. With an adapter, the layers beside an adapted one come along: engines fuse q, k and v, and cannot take q
        alone. Where weights are cut among processes, one weight at a time is made whole, and all processes have to take
        all of them.
        """
        self.let_go()
        adapted = adapted_layers(self.model) if self.lora else {}
        layers = {f"{name}.weight": layer for name, layer in adapted.items()}
        blocks = {name.rsplit(".", 2)[0] for name in layers}
        for name, p in self.model.named_parameters():
            name = name.replace(".base_layer.", ".")
            if name in layers:
                yield name, whole(merged(layers[name]))
            elif p.requires_grad if self.lora is None else name.rsplit(".", 2)[0] in blocks:
                yield name, whole(p.detach().to(_TORCH[self.dtype]))

    def folder_weights(self) -> dict[str, Tensor]:
        """Returns the values that the trainable weights have in the folder, in the policy's `dtype`.

        This is for policies without an adapter.
        """
        own = self.trainable()
        return {name: cut(value, own[name]).to(_TORCH[self.dtype]) for name, value in self._stored(own.keys())}

    def _stored(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields the weights of these names in the folder's files, which are mapped and not read."""
        missing = set(names)
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in [name for name in tensors.keys() if name in missing]:  # noqa: SIM118 - not a dict
                    yield name, tensors.get_tensor(name)
                    missing.remove(name)
        if missing:
            raise ValueError(f"{self.folder} lacks {len(missing)} of the weights, such as {min(missing)}")

    def save_adapter(self, folder: Path | str | None) -> None:
        """Writes the adapter in peft's format, in the policy's dtype, to which a merge rounds it anyway.

        Args:
            folder: folder to write; None writes nothing, for a process that only gives its part of the weights
        """
        self._refuse_full_weights()
        self.let_go()
        base = str(self.folder) if self.adapter else self.base
        save_adapter(self.model, None if folder is None else Path(folder), _TORCH[self.dtype], base)

    def save_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes the whole model with other `weights`, by the names of `trainable`, in the policy's dtype.

        Args:
            folder: folder to write, which exists
            weights: all weights that training changes, of a policy without an adapter
        """
        write_model(self.folder, folder, weights, self.dtype)

    def load_adapter(self, folder: Path | str) -> None:
        """Takes the weights of an adapter of the same shape that `save_adapter` or peft has written."""
        self._refuse_full_weights()
        load_adapter(self.model, Path(folder))

    def load_trainable(self, weights: dict[str, Tensor]) -> None:
        """Copies `weights` into the trainable weights.

        Raises:
            ValueError: names or shapes differ.
        """
        own = self.trainable()
        if own.keys() != weights.keys():
            odd = sorted(own.keys() ^ weights.keys())
            raise ValueError(f"expected the {len(own)} trainable weights, got {len(weights)}; not in both: {odd[:4]}")
        for name, p in own.items():
            if p.shape != weights[name].shape:
                raise ValueError(f"{name} has the shape {tuple(weights[name].shape)}, expected {tuple(p.shape)}")
        self._fill(weights)

    def train(self, mode: bool = True) -> Policy:
        """Changes nothing: without dropout, the policy computes the same in training and in evaluation."""
        return self

    def _refuse_full_weights(self) -> None:
        if self.lora is None:
            raise ValueError("this policy trains full weights and has no adapter to save or load")

    def _refuse_non_linear_head(self) -> None:
        """Raises ValueError if head(hidden) is not the model's logits, as with soft-capping or another attention."""
        config = self.model.config
        if getattr(config, "final_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None):
            raise ValueError(f"{config.model_type} soft-caps its logits, so its head is not linear: not supported")
        ids = [(i + 1) * (config.vocab_size // 14) for i in range(12)]
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            expected = self._logits(torch.tensor([ids], device=self.device))[0, 3:-1]
            got = self._head(self.hidden([ids[:4]], [ids[4:], ids[4:6]], [0, 0])[:8])
        off = float((got - expected).abs().mean() / expected.abs().mean())
        if off > 0.1:
            raise ValueError(f"the logits of {config.model_type} are {off:.0%} off head(last states): not supported")


class OutOfMemory(RuntimeError):
    """Memory ran out in one of the processes that hold the weights, and all of them know it."""


def out_of_memory(error: Exception) -> bool:
    """Returns whether memory ran out; for a CPU, PyTorch has no class of its own for that."""
    known = torch.OutOfMemoryError | MemoryError | OutOfMemory
    return isinstance(error, known) or "can't allocate memory" in str(error)


_TORCH = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def quickest_dtype() -> Dtype:
    """Returns bfloat16 on a GPU and on a processor with instructions for it that oneDNN uses, and float32 elsewhere."""
    fast = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if fast else "float32"


def _checkpoint_layers(model: Any) -> None:
    """Has each layer computed anew in the backward pass; transformers does so only in layers in training mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
