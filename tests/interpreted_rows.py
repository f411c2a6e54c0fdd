"""Runs the kernels of `ogls.loss` in Triton's interpreter, in a process that loads Triton in that mode.

TRITON_INTERPRET=1 python interpreted_rows.py FILE      # a tuple of results a case, through torch.save
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ogls.loss.alpha_bound import HALVINGS
from ogls.loss.chunked import accumulation_dtype
from ogls.loss.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL, SkewKL
from ogls.loss.topk import TopK

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
    further: bool = True  # whether a gradient and log-probs are asked for, too
    support: TopK | None = None
    vocab: int = VOCAB

    def run(self, row_passes: Callable[..., None], device: str = "cpu") -> tuple[Tensor, ...]:
        """Divergences, log-probs (or none) and the gradient (or the logits as they were)."""
        generator = torch.Generator().manual_seed(0)
        logits, gaps = ((3 * torch.randn(ROWS, self.vocab, generator=generator)).to(self.dtype) for _ in range(2))
        logits[0, -1], gaps[1, 0] = 40.0, -30.0  # a sure student; a token that the target hardly has
        logits, gaps = logits.to(device), gaps.to(device)
        values, logprobs = torch.zeros(2, ROWS, dtype=accumulation_dtype(logits), device=device)
        ids = torch.tensor([0, 20, self.vocab - 1], device=device)
        sampled = (ids, logprobs) if self.further else (None,)  # as `ogls.loss.chunked.by_chunks` calls them
        options = {} if self.support is None else {"support": self.support}
        row_passes(
            *(logits, gaps, values, *sampled),
            divergence=self.divergence,
            temperature=1.7,
            clip=self.clip,
            one_sided=self.one_sided,
            wants_gradient=self.further,
            **options,
        )
        return values.cpu(), logprobs.cpu(), logits.cpu()


CASES = [
    Case(divergence, *clip, dtype, further)
    for divergence, clip, dtype, further in itertools.product(DIVERGENCES, CLIPS, DTYPES, (True, False))
]
TOP = [
    Case(divergence, *clip, dtype, further, TopK(k))
    for divergence, clip, dtype, further in itertools.product(DIVERGENCES, CLIPS, DTYPES[:1], (True, False))
    for k in (7, VOCAB)
]
QWEN3 = [  # at the size of a real vocabulary, and with blocks as on a GPU
    Case(divergence, None, False, torch.float32, True, support, vocab=151_936)
    for divergence, support in ((ForwardKL(), None), (JensenShannon(), None), (JensenShannon(), TopK(100)))
]
BUDGETS = [1e-4, 0.05, 1.0, 100.0]


def alphas(bisect: Callable[..., None], epsilon: float, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits, deltas = ((3 * torch.randn(ROWS, VOCAB, generator=generator)).double().to(device) for _ in range(2))
    deltas[1] = 0.0
    found = torch.zeros(ROWS, dtype=torch.float64, device=device)
    bisect(logits, deltas, found, alpha_max=4.0, epsilon=epsilon)
    return found.cpu()


if __name__ == "__main__":
    from ogls.loss import triton_alpha, triton_rows, triton_topk

    def run(case: Case) -> tuple[Tensor, ...]:
        return case.run(triton_rows.divergence_rows if case.support is None else triton_topk.topk_rows)

    wide = [run(case) for case in QWEN3]
    triton_rows.BLOCK = triton_topk.BLOCK = triton_alpha.BLOCK = BLOCK
    found = [alphas(partial(triton_alpha.bisect_rows, halvings=HALVINGS), epsilon) for epsilon in BUDGETS]
    torch.save((*([run(case) for case in cases] for cases in (CASES, TOP)), wide, found), sys.argv[1])
