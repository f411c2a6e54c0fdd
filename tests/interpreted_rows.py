"""Runs the kernel of `ogls.loss.triton_rows` in Triton's interpreter, in a process that loads Triton in that mode.

TRITON_INTERPRET=1 python interpreted_rows.py FILE      # a tuple of results a case, through torch.save
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ogls.loss.chunked import accumulation_dtype
from ogls.loss.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL, SkewKL

ROWS, VOCAB, BLOCK = 3, 53, 16  # the last block is partly empty
DIVERGENCES = [ForwardKL(), ReverseKL(), JensenShannon(0.3), SkewKL(0.1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CLIPS = [(None, False), (0.02, False), (0.02, True)]


@dataclass(frozen=True)
class Case:
    divergence: Divergence
    clip: float | None
    one_sided: bool
    dtype: torch.dtype
    further: bool  # whether a gradient and log-probs are asked for, too

    def run(self, divergence_rows: Callable[..., None]) -> tuple[Tensor, ...]:
        """Divergences, log-probs (or none) and the gradient (or the logits as they were)."""
        generator = torch.Generator().manual_seed(0)
        logits, gaps = ((3 * torch.randn(ROWS, VOCAB, generator=generator)).to(self.dtype) for _ in range(2))
        logits[0, -1], gaps[1, 0] = 40.0, -30.0  # a sure student; a token that the target hardly has
        values, logprobs = torch.zeros(2, ROWS, dtype=accumulation_dtype(logits))
        sampled = (torch.tensor([0, 20, VOCAB - 1]), logprobs) if self.further else (None, None)
        divergence_rows(
            *(logits, gaps, values, *sampled),
            divergence=self.divergence,
            temperature=1.7,
            clip=self.clip,
            one_sided=self.one_sided,
            wants_gradient=self.further,
        )
        return values, logprobs, logits


CASES = [
    Case(divergence, *clip, dtype, further)
    for divergence, clip, dtype, further in itertools.product(DIVERGENCES, CLIPS, DTYPES, (True, False))
]

if __name__ == "__main__":
    from ogls.loss import triton_rows

    triton_rows.BLOCK = BLOCK
    torch.save([case.run(triton_rows.divergence_rows) for case in CASES], sys.argv[1])
