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
        kept_bytes: bytes per trainable weight that a teacher keeps on the device
        chunk_bytes: largest scratch memory of the loss
        other: shapes of a teacher that is another model; None for one that lends weights to the policy
        parts: number of devices among which weights, gradients, optimiser and teachers are cut (`--trainer.strategy
            sharded`); 1 holds them whole
        embeddings: whether embeddings and output head are trained, too
    """

    shapes: Shapes
    rank: int
    targets: Sequence[str]
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    kept_bytes: int = 0
    chunk_bytes: int = 0
    other: Shapes | None = None
    parts: int = 1
    embeddings: bool = False

    # ---- what is held from step to step ----

    @property
    def trainable(self) -> int:
        """Returns the number of weights that are trained."""
        if not self.rank:
            return self.shapes.weights if self.embeddings else self.shapes.trunk
        adapted = [size for name, size in self.shapes.projections.items() if name in self.targets]
        return self.shapes.layers * self.rank * sum(inputs + outputs for inputs, outputs in adapted)

    @property
    def weights(self) -> int:
        """Returns the bytes of the model's weights and the adapter's; whatever is trained is fp32."""
        frozen = self.shapes.weights if self.rank else 0 if self.embeddings else self.shapes.embeddings
        return self._part(2 * self._wider * frozen + 4 * self.trainable)

    @property
    def optimiser(self) -> int:
        """Returns the bytes of gradients and of AdamW's two means, all fp32."""
        return self._part((4 + 8) * self.trainable)

    @property
    def teacher(self) -> int:
        """Returns the bytes of weights that teachers keep, another model's among them."""
        own = 0 if self.other is None else 2 * self._wider * self.other.weights
        return self._part(self.kept_bytes * self.trainable + own)

    @property
    def gathered(self) -> int:
        """Returns the bytes of what is whole at a time of weights that are cut.

        These are embeddings and head of each model, the layer under way, the next one, and a layer's gradients.
        """
        if self.parts == 1:
            return 0
        models = [self.shapes, *([] if self.other is None else [self.other])]
        wide = sum(2 * self._wider * model.embeddings for model in models)
        layer = max(2 * self._wider * model.trunk // model.layers for model in models)
        return wide + 2 * layer + 4 * self.trainable // self.shapes.layers

    @property
    def held(self) -> int:
        """Returns the bytes that are held from step to step."""
        return self.weights + self.optimiser + self.teacher + self.gathered

    def _part(self, size: int) -> int:
        return -(-size // self.parts)

    # ---- what a micro-batch needs beside it ----

    def micro_batch(self, tokens: int, checkpointing: bool) -> int:
        """Returns the most bytes that a micro-batch of `tokens` tokens needs at once, beside what is held."""
        kept, casts, _ = self._kept(checkpointing)
        chunk = min(self.chunk_bytes, 2 * 2 * self._wider * self.shapes.vocab * tokens)  # logits of both sides
        in_loss = kept * tokens + (0 if checkpointing else casts) + chunk + self._trained_head
        return max(in_loss, self.student(tokens, checkpointing)) + self._states * tokens

    def student(self, tokens: int, checkpointing: bool) -> int:
        """Returns the most bytes of the student's pass and its gradient, without targets and loss."""
        kept, casts, after = self._kept(checkpointing)
        last_layer = (self.shapes.layers - 1) * self._input * tokens + self.forward(tokens) if checkpointing else 0
        return max((kept + after) * tokens + casts, last_layer)

    def forward(self, tokens: int) -> int:
        """Returns the most bytes of a pass without a gradient; weights that are trained are cast to bf16 in it."""
        s = self.shapes
        h, q, k, m = s.hidden, s.queries, s.keys, s.mlp
        in_mlp, in_attention = 8 * h + 6 * m, 6 * h + 6 * q + 6 * k + 4 * s.heads
        rotation, ids = 4 * s.head_size, 32
        at_peak = self._wider * (max(in_mlp, in_attention) + rotation) + ids
        return at_peak * tokens + (0 if self.rank else self._casts - self._last_cast)

    def teacher_pass(self, tokens: int, learned: int) -> int:
        """Returns the most bytes that a teacher needs to read `tokens` tokens, `learned` of them with a target."""
        reader = self if self.other is None else Training(shapes=self.other, rank=1, targets=(), dtype=self.dtype)
        aside = self._part(4 * self.trainable) if self.parts > 1 and self.kept_bytes else 0  # the student's part
        return reader.forward(tokens) + 2 * 4 * reader.shapes.hidden * learned + aside

    @property
    def _trained_head(self) -> int:
        """Returns the bytes of a trained head beside itself: its values, its gradient and the teacher's head in the
        computation's dtype, and its gradient in fp32.
        """
        return (3 * 2 * self._wider + 4) * self.shapes.head if self.embeddings else 0

    @property
    def _wider(self) -> int:
        return 1 if self.dtype == "bfloat16" else 2

    @property
    def _casts(self) -> int:
        """Returns the bytes of the weights that a pass casts to the computation's dtype: autocast's, or A and B.

        Weights that are cut are cast as they are gathered.
        """
        if self.dtype == "float32" or self.parts > 1:
            return 0
        return 2 * (self.trainable if self.rank else self.shapes.products)

    @property
    def _input(self) -> int:
        """Returns the bytes of a layer's input."""
        return 2 * self._wider * self.shapes.hidden

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
        norms = 2 * (2 * h + 4)  # input, root mean square
        products = 2 * (h + h) + 2 * self.rank * len(self.targets)  # inputs of q, k, v and of gate, up; of B
        heads = 2 * (q + k) + 4 * (s.heads + s.kv_heads)  # before they are normalised; root mean squares
        attention = 2 * (q + k + k + q) + 4 * s.heads  # queries, keys, values, output, which is an input; log-sums
        mlp = 2 * 3 * m  # gate, up, silu(gate) up, which is an input
        return (norms + products + attention + mlp + (heads if s.norms_heads else 0)) * self._wider

    @property
    def _last_cast(self) -> int:
        """Returns the bytes of the cast weights of the last product of the MLP, which follows its peak."""
        return 2 * self.shapes.hidden * self.shapes.mlp if self._casts else 0

    def _kept(self, checkpointing: bool) -> tuple[int, int, int]:
        """Returns bytes per token that a pass keeps, bytes of cast weights beside them, and bytes per token that the
        backward pass needs in addition, when it begins or in the last layer.
        """
        s = self.shapes
        ends = self._input + 4 * self._wider * s.head_size  # input of the last norm; rotation
        begins = self._wider * (4 * s.mlp + 2 * s.hidden)
        if not checkpointing:
            return s.layers * self._layer + ends, self._casts, begins
        casts = self._casts // s.layers - (0 if self.rank else self._last_cast)
        return s.layers * self._input + ends, casts, self._layer + begins
