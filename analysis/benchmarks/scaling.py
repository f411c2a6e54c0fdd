"""How time grows with T, V and K (loss) and with K, G and length (teacher): curves, and the slope in log-log.

    python analysis/benchmarks/scaling.py                    # all curves; about five minutes on two quiet cores
    python analysis/benchmarks/scaling.py --curves T K

1 is linear, 0 is flat. Expected: loss T 1, V 1, K 0 (one head for all views, whatever their number); teacher K 1, G 1
at most, less where prefixes are shared, length 1 until attention weighs.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import announce, exponent, interval, log, parser, time_sides
from loss import make_inputs, ours
from rows import lessons, random_model

from ogls.loss.divergence import ForwardKL
from ogls.loss.steering import OutcomeSteering
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.states import view_states

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}


def of_loss(tokens: int = 256, vocab: int = 49152, views: int = 8) -> Callable[[], object]:
    inputs = make_inputs(tokens, vocab, 576, views, torch.bfloat16)
    return functools.partial(ours, inputs, ForwardKL())


def of_teacher(policy: Policy, views: int = 4, group_size: int = 8, length: int = 64) -> Callable[[], object]:
    batch = lessons(1, group_size, 48, length, views, SHAPE["vocab_size"])
    num_scored = [lesson.num_learned for lesson in batch]

    def score() -> None:
        with policy.without_adapter():
            view_states(policy, OutcomeSteering(), batch, num_scored, 8192)

    return score


def curves(policy: Policy) -> dict[str, tuple[str, list[int], Callable[[int], Callable[[], object]]]]:
    def teacher(name: str) -> Callable[[int], Callable[[], object]]:
        return lambda size: of_teacher(policy, **{name: size})

    return {
        "T": ("loss, tokens", [64, 128, 256, 512, 1024], lambda size: of_loss(tokens=size)),
        "V": ("loss, vocabulary", [8192, 24576, 49152, 98304], lambda size: of_loss(vocab=size)),
        "K": ("loss, views", [2, 4, 8, 16], lambda size: of_loss(views=size)),
        "views": ("teacher, views K", [2, 4, 8], teacher("views")),
        "G": ("teacher, rollouts G", [2, 4, 8, 16], teacher("group_size")),
        "length": ("teacher, length", [32, 64, 128, 256], teacher("length")),
    }


def main() -> None:
    options = parser(__doc__ or "", rounds=5)
    options.add_argument("--curves", nargs="*", default=["T", "V", "K", "views", "G", "length"])
    args = options.parse_args()
    announce(args)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy(str(random_model(Path(folder), **SHAPE)), lora=Lora()).load()
    for name in args.curves:
        title, sizes, side_of = curves(policy)[name]
        seconds = time_sides({str(size): side_of(size) for size in sizes}, args)
        slopes = np.array([exponent(sizes, [seconds[str(s)][r] for s in sizes]) for r in range(args.rounds)])
        slope, low, high = interval(slopes)
        medians = ", ".join(f"{size}: {1e3 * np.median(seconds[str(size)]):.0f} ms" for size in sizes)
        print(f"{title:22} exponent {slope:5.2f} [{low:.2f}, {high:.2f}]   {medians}", flush=True)
        figures |= {f"{name}/exponent": slope, f"{name}/low": low, f"{name}/high": high}
        figures |= {f"{name}/{size}/ms": 1e3 * float(np.median(seconds[str(size)])) for size in sizes}
    log("scaling", figures, args)


if __name__ == "__main__":
    main()
