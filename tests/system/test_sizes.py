"""Rows of many lengths become rows of few."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ogls.policy.layout import Grids
from ogls.policy.packing import pack
from ogls.system.sizes import rounded_up

CPU = torch.device("cpu")


@given(st.integers(0, 100_000))
def test_sizes_are_few_and_near(size: int) -> None:
    up = rounded_up(size, CPU)
    assert size <= up < size + max(16, size / 16)
    assert rounded_up(up, CPU) == up
    assert rounded_up(size, torch.device("cuda")) == size


def test_how_many_there_are() -> None:
    assert len({rounded_up(size, CPU) for size in range(1, 4097)}) == 32 + 3 * 16


def test_padding_is_seen_by_nobody() -> None:
    """Root [1 2 3] with the branches [4 5] and [6]: five tokens, of which the last of a suffix is not run."""
    packing = pack([[1, 2, 3]], [[4, 5], [6]], [0, 0], share_prefixes=True, device=CPU, dtype=torch.float32)
    assert packing.token_ids.tolist() == [1, 2, 3, 4] + [0] * 12
    assert packing.position_ids[:4].tolist() == [0, 1, 2, 3]
    assert packing.predicting.tolist() == [2, 3, 2]
    assert isinstance(packing.layout, Grids)
    assert packing.layout.branches is not None
    assert packing.layout.mask is not None
    assert packing.layout.roots.longest == packing.layout.branches.longest == 16
    assert (packing.layout.mask[0, 0, 0] == 0).nonzero().squeeze(1).tolist() == [0, 1, 2, 16]
