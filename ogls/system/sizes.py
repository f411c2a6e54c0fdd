"""Rounded sizes let a CPU compile few kernels for its matrix products.

oneDNN, which multiplies matrices on a CPU, compiles a kernel for every size that it meets and keeps all of them for
good, whatever the capacity of its primitive cache. 270 KiB per size and kind of product were measured (torch 2.13,
bf16, AMX), which is 20 to 50 MB per training step if no two steps have the same number of tokens. Compiling also takes
a millisecond per size.
"""

from __future__ import annotations

import torch


def rounded_up(size: int, device: torch.device) -> int:
    """Returns `size` rounded up to a multiple of 16, or of 1/32 to 1/16 of a size above 512; on a GPU it stays."""
    if device.type != "cpu":
        return size
    step = max(16, 1 << max(0, size.bit_length() - 5))
    return -(-size // step) * step
