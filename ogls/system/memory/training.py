"""What training holds is counted here, from weights to activations.

The formulas follow `ogls.policy`: each term of `_layer` is a tensor that a layer keeps for its gradient, and a test
compares them with a pass of the policy itself on meta tensors. Sizes are bytes per token unless they say otherwise; h,
q, k and m stand for the widths of states, queries, keys and MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ogls.system.memory.shapes import Shapes


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training counts the bytes that the trainer holds on its device.

    Args:
        shapes: shapes of the model
        rank: rank of the adapter; 0 trains all weights but embeddings and output head
        targets: last part of the names of the linear layers that have an adapter
        dtype: dtype of the computation, see `ogls.policy.policy.Policy`
        kept_copies: copies of the trainable weights, in fp32, that a teacher keeps on the device
        swapped_copies: copies of the trainable weights, in fp32, that lie there while a teacher reads
        chunk_bytes: scratch memory of the loss
    """

    shapes: Shapes
    rank: int
    targets: Sequence[str]
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    kept_copies: int = 0
    swapped_copies: int = 0
    chunk_bytes: int = 0

    # ---- what is held from step to step ----

    @property
    def trainable(self) -> int:
        """Returns the number of weights that are trained."""
        if not self.rank:
            return self.shapes.trunk
        adapted = [size for name, size in self.shapes.projections.items() if name in self.targets]
        return self.shapes.layers * self.rank * sum(inputs + outputs for inputs, outputs in adapted)

    @property
    def weights(self) -> int:
        """Returns the bytes of the model's weights and the adapter's; whatever is trained is fp32."""
        if not self.rank:
            return 4 * self.shapes.weights
        return (2 if self.dtype == "bfloat16" else 4) * self.shapes.weights + 4 * self.trainable

    @property
    def optimiser(self) -> int:
        """Returns the bytes of gradients and of AdamW's two means, all fp32."""
        return (4 + 8) * self.trainable

    @property
    def teacher(self) -> int:
        """Returns the bytes of weights that a teacher keeps."""
        return 4 * self.trainable * self.kept_copies

    @property
    def held(self) -> int:
        """Returns the bytes that are held from step to step."""
        return self.weights + self.optimiser + self.teacher

    # ---- what a micro-batch needs beside it ----

    def micro_batch(self, tokens: int, checkpointing: bool) -> int:
        """Returns the most bytes that a micro-batch of `tokens` tokens needs at once, beside what is held."""
        kept, casts, _ = self._kept(checkpointing)
        in_loss = kept * tokens + (0 if checkpointing else casts) + self.chunk_bytes
        return max(in_loss, self.student(tokens, checkpointing)) + self._states * tokens

    def student(self, tokens: int, checkpointing: bool) -> int:
        """Returns the most bytes of the student's pass and its gradient, without targets and loss."""
        kept, casts, after = self._kept(checkpointing)
        layers = self.shapes.layers
        backward = (kept + after) * tokens + (casts // layers if checkpointing else casts)
        last_layer = (layers - 1) * self._input * tokens + self.forward(tokens) if checkpointing else 0
        return max(backward, last_layer)

    def forward(self, tokens: int) -> int:
        """Returns the most bytes of a pass without a gradient; weights that are trained are cast to bf16 in it."""
        s = self.shapes
        h, q, k, m = s.hidden, s.queries, s.keys, s.mlp
        if self.rank:
            return self._wider * tokens * max(8 * h + 6 * m, 6 * h + 10 * q + 8 * k + 4 * s.heads)
        in_mlp = (16 * h + 6 * m) * tokens - 2 * h * m  # without the casts that the last layer has not made yet
        in_attention = (12 * h + 20 * q + 12 * k + 4 * s.heads) * tokens - 2 * (q * h + 3 * h * m)
        return max(in_mlp, in_attention) + self._casts

    def teacher_pass(self, tokens: int, learned: int) -> int:
        """Returns the most bytes that a teacher needs to read `tokens` tokens, `learned` of them with a target."""
        return self.forward(tokens) + 4 * self.trainable * self.swapped_copies + 2 * 4 * self.shapes.hidden * learned

    @property
    def _wider(self) -> int:
        return 1 if self.dtype == "bfloat16" else 2

    @property
    def _casts(self) -> int:
        """Returns the bytes of the weights that a pass casts to the computation's dtype: autocast's, or A and B."""
        if self.dtype == "float32":
            return 0
        return 2 * (self.trainable if self.rank else self.shapes.products)

    @property
    def _input(self) -> int:
        """Returns the bytes of a layer's input: fp32 where weights are, since embeddings are."""
        return (2 * self._wider if self.rank else 4) * self.shapes.hidden

    @property
    def _states(self) -> int:
        """Returns the bytes of a learned token's states: anchor, direction and target in fp32, the same three and the
        student's again where only some tokens count, and the loss's gradient.
        """
        return 30 * self.shapes.hidden

    @property
    def _layer(self) -> int:
        """Returns the bytes that a layer keeps for its gradient."""
        s = self.shapes
        h, q, k, m = s.hidden, s.queries, s.keys, s.mlp
        attention = 2 * (q + q + q + q) + 4 * s.heads  # queries, keys and values for each of them, output; log-sums
        mlp = 2 * 4 * m  # gate, its silu, up, their product
        if self.rank:
            norms = 2 * (4 * h + 4)  # input in fp32, root mean square
            products = 2 * (h + q + h) + 2 * self.rank * len(self.targets)  # inputs of A, which some share; of B
            heads = 4 * (q + k) + 4 * (s.heads + s.kv_heads)
        else:
            norms = 2 * (4 * h + 4 * h + 4)  # and the normalised input
            products = 2 * (3 * h + q + 2 * h)  # inputs in bf16, which autocast casts once per product
            heads = (4 + 2) * (q + k) + 4 * (s.heads + s.kv_heads)
        return (norms + products + attention + mlp + (heads if s.norms_heads else 0)) * self._wider

    def _kept(self, checkpointing: bool) -> tuple[int, int, int]:
        """Returns bytes per token that a pass keeps, bytes of cast weights beside them, and bytes per token that the
        backward pass needs in addition, when it begins or in the last layer.
        """
        s = self.shapes
        h, wide = s.hidden, self._input // s.hidden
        ends = wide * h + (0 if self.rank else 4 * h) + 2 * wide * s.head_size  # last states, last norm; rotation
        begins = 22 * h if self.rank else 20 * h
        if not checkpointing:
            return s.layers * self._layer + ends, self._casts, max(begins, 4 * s.mlp)
        kept = s.layers * self._input + ends + 4 * h
        return kept, self._casts, max(begins, self._layer + 4 * s.mlp - (0 if self.rank else 4 * h))
