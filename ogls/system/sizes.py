"""Few different sizes for the matrices of a CPU.

oneDNN, which multiplies them, compiles a kernel for every size it meets and keeps all of them for good, whatever the
capacity of its primitive cache: 270 KiB a size and kind of product were measured (torch 2.13, bf16, AMX), which is 20
to 50 MB a training step when no two steps have the same number of tokens. Compiling takes a millisecond a size, too.
"""

from __future__ import annotations

import torch


def rounded_up(size: int, device: torch.device) -> int:
    """The next multiple of 16, or of 1/16 to 1/32 of a size above 512; on a GPU the size itself."""
    if device.type != "cpu":
        return size
    step = max(16, 1 << max(0, size.bit_length() - 5))
    return -(-size // step) * step
