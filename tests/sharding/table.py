"""Prints how far 2 and 4 sharded processes are from one, and what each of them holds, case by case.

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python -m tests.sharding.table [CASE ...]

The model is that of experiments/lab, which trains for 8 steps at a rate of 1e-5. *Other micro-batches* is one process
with half the budget of tokens, whose sums are made in another order, too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults.nursery import ROOT, Nursery
from tests.sharding.launcher import Ranks, gap, losses_gap, told
from tests.sharding.ranks import CASES

KINDS = ("weights", "gradients", "Adam", "teacher")
BUDGET = 400  # tokens per micro-batch


def line(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main(cases: list[str]) -> None:
    nursery = Nursery()
    line("case", "processes", "losses", "weights", *(f"bytes: {kind}" for kind in KINDS))
    line("---", "---:", "---:", "---:", *("---:" for _ in KINDS))
    try:
        for case in cases:
            with TemporaryDirectory() as place:
                ranks = Ranks(nursery, ROOT / "experiments/lab/student", Path(place))
                one = ranks.run("1", 1, case, tokens_per_micro_batch=BUDGET)
                whole = told(one)["held"]
                line(case, 1, "", "", *(f"{whole[kind]:,}" for kind in KINDS))
                other = ranks.run("other", 1, case, tokens_per_micro_batch=BUDGET // 2)
                line("", "other micro-batches", f"{losses_gap(other, one):.0e}", f"{gap(other, one):.0e}", *KINDS_EMPTY)
                for size in (2, 4):
                    several = ranks.run(str(size), size, case, tokens_per_micro_batch=BUDGET)
                    losses = max(losses_gap(several, one, rank) for rank in range(size))
                    held = [told(several, rank)["held"] for rank in range(size)]
                    most = {kind: max(own[kind] for own in held) for kind in KINDS}
                    shares = (f"{most[kind] / whole[kind]:.3f}" if whole[kind] else "0" for kind in KINDS)
                    line("", size, f"{losses:.0e}", f"{gap(several, one):.0e}", *shares)
    finally:
        nursery.close()


KINDS_EMPTY = ("",) * len(KINDS)

if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
