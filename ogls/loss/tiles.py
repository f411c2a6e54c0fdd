"""Work on logits runs in chunks that fit a budget and tiles that fit caches.

A *chunk* of tokens is as large as its logits buffers may be: each matrix product reads the whole head, so few large
chunks are quick. A *tile* is a few rows of a chunk, small enough to stay in the caches through all row passes.

On a CPU the tiles are shared out to threads, each of which runs a tile's operations on one core. Otherwise each
operation would be spread over all cores and wait for the slowest, some 20 times per tile. On a machine that is also
busy with something else, that was measured to be more than ten times as slow.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from ogls.system.sizes import rounded_up

# Bytes of all logits buffers of a chunk. Small chunks cost time on a CPU: each product reads and repacks the head anew
# (512 rows at |V| = 49,152 on one core: 90 ms in one chunk of 96 MiB, 100 ms in two of 48, 170 ms in four).
CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 1200 << 20}
# Bytes of one fp32 tile, of which about five are alive at a time. On a CPU these have to fit into a core's cache. On a
# GPU, where only divergences without a kernel and top-k supports have tiles, a tile has to be worth its launches (not
# measured yet).
TILE_BYTES = {"cpu": 3 << 17, "cuda": 1 << 28}


def chunks(num_tokens: int, weight: Tensor, num_buffers: int, chunk_rows: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices that cover all tokens, each with logits buffers [num_buffers, rows, vocab] in the head's dtype.

    All chunks but the last have a rounded number of rows (`ogls.system.sizes`). All chunks, and those of the next call,
    share the same memory: a thread can work on one loss at a time.

    Args:
        num_tokens: number of tokens to cover
        weight: weight of the output head [vocab, hidden]
        num_buffers: number of logits that each token needs at once
        chunk_rows: tokens per chunk; None takes as many as fit into the byte budget
    """
    fits = max(1, CHUNK_BYTES[weight.device.type] // (num_buffers * len(weight) * weight.element_size()))
    rows = chunk_rows or min(fits, rounded_up(even_rows(num_tokens, fits), weight.device))
    buffers = scratch(num_buffers * rows * len(weight), weight)
    for block in blocks(num_tokens, rows):
        size = num_buffers, block.stop - block.start, len(weight)
        yield block, buffers[: math.prod(size)].view(size)


class Kept(threading.local):
    """Kept holds the scratch memory of each thread."""

    memory = torch.empty(0, dtype=torch.uint8)


KEPT = Kept()


def scratch(size: int, like: Tensor) -> Tensor:
    """Returns a tensor [size] with any content, of the dtype and on the device of `like`.

    On a CPU its memory is kept between calls: to get 96 MiB from the system anew takes half as long as the matrix
    products of the loss.
    """
    if like.device.type != "cpu":
        return like.new_empty(size)
    num_bytes = size * like.element_size()
    if KEPT.memory.nbytes < num_bytes:
        with torch.inference_mode(False):  # usable in and out of it
            KEPT.memory = torch.empty(num_bytes, dtype=torch.uint8)
    return KEPT.memory[:num_bytes].view(like.dtype)


def for_each_tile(
    function: Callable[..., None], logits: Tensor, *beside: Tensor | None, tile_bytes: int | None = None
) -> None:
    """Calls `function` once for each tile, with the tile's rows of `logits` and of the tensors `beside`.

    The rows are views, into which `function` writes its results; None is handed on as None. On a CPU the calls run side
    by side, in no particular order. A tile is `tile_bytes` in fp32 at most, or as many as `TILE_BYTES` has for torch
    operations.
    """
    tensors = (logits, *beside)
    row_bytes = logits.shape[-1] * max(4, logits.itemsize)

    def run(tile: slice) -> None:
        function(*(None if tensor is None else tensor[tile] for tensor in tensors))

    tile_bytes = tile_bytes or TILE_BYTES[logits.device.type]
    tiles = blocks(len(logits), even_rows(len(logits), tile_bytes // row_bytes))
    num_threads = torch.get_num_threads()
    if logits.device.type != "cpu" or num_threads == 1 or len(tiles) == 1:
        for tile in tiles:
            run(tile)
        return
    inference = torch.is_inference_mode_enabled()

    def run_in_thread(tile: slice) -> None:  # gradient modes are a thread's own
        with torch.inference_mode(inference), torch.no_grad():
            run(tile)

    for _ in one_core_threads(num_threads).map(run_in_thread, tiles):
        pass


@cache
def one_core_threads(num_threads: int) -> ThreadPoolExecutor:
    """Returns threads that each run torch operations on one core; in all other threads they use `num_threads`."""
    started = threading.Barrier(num_threads)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the number over when it first asks for it, and keeps it
        started.wait()

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="ogls-tiles", initializer=start)
    for _ in pool.map(lambda _: None, range(num_threads)):
        pass
    torch.set_num_threads(num_threads)  # the workers have changed the number that later threads begin with
    return pool


def blocks(num_rows: int, rows: int) -> list[slice]:
    """Returns slices of `rows` rows, the last one possibly shorter, that cover `num_rows` rows."""
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def even_rows(num_rows: int, at_most: int) -> int:
    """Returns the number of rows per block, at most `at_most`, that makes the blocks as even as possible."""
    num_blocks = -(-num_rows // max(1, at_most))
    return max(1, -(-num_rows // max(1, num_blocks)))
