"""Chunks within their budget and in the same buffers; tiles that cover every row once, on threads of one core."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ogls.loss import tiles as blocking
from ogls.loss.tiles import blocks, chunks, even_rows, for_each_tile, scratch


@given(st.integers(0, 500), st.integers(0, 60))
def test_even_blocks_cover_every_row_once_within_the_budget(num_rows: int, at_most: int) -> None:
    cut = blocks(num_rows, even_rows(num_rows, at_most))
    assert [row for block in cut for row in range(block.start, block.stop)] == list(range(num_rows))
    sizes = [block.stop - block.start for block in cut]
    assert max(sizes, default=0) <= max(1, at_most)
    if at_most:
        assert len(sizes) == -(-num_rows // at_most) or max(sizes) - min(sizes[:-1] or sizes) <= 1


def test_chunks_keep_to_their_budget_and_reuse_their_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocking.CHUNK_BYTES, "cpu", 8 * 2 * 13 * 8)
    made = list(chunks(23, torch.zeros(13, 5, dtype=torch.float64), 2, None))
    assert [(rows.start, rows.stop) for rows, _ in made] == [(0, 8), (8, 16), (16, 23)]
    assert [tuple(len(buffer) for buffer in buffers) for _, buffers in made] == [(8, 8), (8, 8), (7, 7)]
    assert all(buffers.is_contiguous() for _, buffers in made)  # one product can fill all
    assert len({buffers.data_ptr() for _, buffers in made}) == 1


def test_scratch_is_kept_for_the_next_call() -> None:
    with torch.inference_mode():
        first = scratch(1000, torch.zeros(1)).data_ptr()
    smaller = scratch(1600, torch.zeros(1, dtype=torch.bfloat16))
    assert smaller.data_ptr() == first
    assert smaller.dtype == torch.bfloat16
    smaller += 1.0  # though made in inference mode
    with ThreadPoolExecutor(1) as others:
        assert others.submit(lambda: scratch(1000, torch.zeros(1)).data_ptr()).result() != first


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_tiles_see_their_rows_on_one_core(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocking.TILE_BYTES, "cpu", 2 * 11 * 4)
    logits, out = torch.arange(77.0).view(7, 11), torch.zeros(7)
    cores: list[int] = []

    def add_up(rows: Tensor, nothing: None, sums: Tensor) -> None:
        cores.append(torch.get_num_threads())
        sums += rows.sum(-1)

    for_each_tile(add_up, logits, None, out)
    assert torch.equal(out, logits.sum(-1))
    assert cores == [1] * 4
    assert torch.get_num_threads() == num_threads
    with ThreadPoolExecutor(1) as others:
        assert others.submit(torch.get_num_threads).result() == num_threads


def test_an_error_in_a_tile_arrives(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocking.TILE_BYTES, "cpu", 4)

    def fail(rows: Tensor) -> None:
        raise ValueError("from a tile")

    with pytest.raises(ValueError, match="from a tile"):
        for_each_tile(fail, torch.zeros(4, 1))
