"""A decoder's shapes are read from config.json, and its weights counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_MIXTURE = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Shapes are the widths of a decoder with gated MLPs, such as Llama, SmolLM2, Qwen2 and Qwen3.

    Args:
        layers: number of layers
        hidden: width of the states
        mlp: width of the MLP
        heads: number of query heads
        kv_heads: number of key and value heads
        head_size: width of a head
        vocab: number of tokens in the vocabulary
        tied: whether the output head is the embeddings
        norms_heads: whether queries and keys are normalised, as in Qwen3
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    norms_heads: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shapes:
        """Returns the shapes of the model that a config.json describes.

        Raises:
            ValueError: the model is no dense decoder with gated MLPs.
        """
        config = config.get("text_config", config)
        kind = config.get("model_type", "a model without model_type")
        if missing := [name for name in _NEEDED if name not in config]:
            raise ValueError(f"no memory plan for {kind}: its config.json has no {missing[0]}")
        if any(config.get(name) for name in _MIXTURE):
            raise ValueError(f"no memory plan for {kind}: only dense models are counted, not mixtures of experts")
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            mlp=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            norms_heads=str(kind).startswith("qwen3"),
        )

    @property
    def queries(self) -> int:
        """Returns the width of all query heads."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Returns the width of all key heads, which is that of all value heads."""
        return self.kv_heads * self.head_size

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Returns numbers of inputs and outputs of a layer's linear layers, by the last part of their names."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }

    @property
    def products(self) -> int:
        """Returns the number of weights of all linear layers but the output head."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def trunk(self) -> int:
        """Returns the number of weights of all layers and norms: all but embeddings and output head."""
        norms = 2 * self.hidden + (2 * self.head_size if self.norms_heads else 0)
        return self.products + self.layers * norms + self.hidden

    @property
    def head(self) -> int:
        """Returns the number of weights of the output head."""
        return self.vocab * self.hidden

    @property
    def embeddings(self) -> int:
        """Returns the number of weights of embeddings and output head, which may be the same."""
        return self.head * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        """Returns the number of all weights."""
        return self.trunk + self.embeddings

    @property
    def kv_bytes(self) -> int:
        """Returns the bytes of one token's keys and values, two per number."""
        return 2 * self.layers * 2 * self.keys
