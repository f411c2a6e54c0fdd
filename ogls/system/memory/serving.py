"""What an engine takes of the device is counted here, as vLLM takes it."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.system.memory.shapes import Shapes

BLOCK = 16  # tokens: vLLM keeps keys and values in blocks of so many
_BATCHED_TOKENS = 16384  # vLLM tries a pass of so many tokens when it starts on a GPU of 70 GiB and more
_GRAPHS = 3 << 28  # CUDA graphs of decoding, by vLLM's own estimate 0.5 to 0.75 GiB


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Serving counts the bytes that vLLM takes on its device.

    Args:
        shapes: shapes of the model
        rank: largest rank of an adapter that is served beside the weights; 0 serves merged weights alone
        max_num_seqs: largest number of sequences that are sampled side by side
        graphs: whether decoding is captured as CUDA graphs
        dtype_bytes: bytes per weight
        cached_bytes: bytes per number of keys and values; None is those per weight
        own_process: whether it runs in a process of its own, which has a CUDA context of its own
    """

    shapes: Shapes
    rank: int
    max_num_seqs: int
    graphs: bool
    dtype_bytes: int = 2
    cached_bytes: int | None = None
    own_process: bool = False

    @property
    def weights(self) -> int:
        """Returns the bytes of the weights, and of the place that an adapter is loaded into."""
        s = self.shapes
        slot = s.layers * self.rank * sum(inputs + outputs for inputs, outputs in s.projections.values())
        return self.dtype_bytes * (s.weights + slot)

    @property
    def workspace(self) -> int:
        """Returns the bytes of a pass: states and MLP of the widest batch, three rows of fp32 logits per sequence."""
        s = self.shapes
        passing = _BATCHED_TOKENS * self.dtype_bytes * (4 * s.hidden + 3 * s.mlp)
        return passing + 3 * 4 * self.max_num_seqs * s.vocab + (_GRAPHS if self.graphs else 0)

    def cache(self, tokens: int) -> int:
        """Returns the bytes of the keys and values of a sequence of `tokens` tokens, in whole blocks."""
        return -(-tokens // BLOCK) * BLOCK * self.shapes.kv_bytes * (self.cached_bytes or self.dtype_bytes) // 2

    def share(self, cache: int) -> int:
        """Returns all bytes that the engine takes, `cache` of them for keys and values."""
        return self.weights + self.workspace + cache
