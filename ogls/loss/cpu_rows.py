"""A function in C++ makes the row passes of `ogls.loss.chunked` on a CPU.

Some twenty torch operations, each of which reads and writes a tile, become four loops over a row (`cpu_rows.cpp`). The
first process on a machine builds it in seconds, for the processor's vectors; all others load the file that it left.
Without a C++ compiler, or a place for that file, the torch operations are used as before.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ogls.loss.divergence import KINDS, Divergence, mixture_weight
from ogls.system.cache import cache_folder

TILE_BYTES = 1 << 21  # fp32 logits of one call: rows pass through the cache one by one, and a call has its cost
SOURCE = Path(__file__).with_suffix(".cpp")
VECTORS = {"AVX2": ["-march=x86-64-v3"], "AVX512": ["-march=x86-64-v4"]}
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC"]


class Options(ctypes.Structure):
    """Options are what is the same for all rows."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("weight", "temperature", "low", "high")),
        ("wants_gradient", ctypes.c_int32),
    ]


def divergence_rows(
    logits: Tensor,
    gaps: Tensor,
    values: Tensor,
    ids: Tensor | None = None,
    logprobs: Tensor | None = None,
    *,
    divergence: Divergence,
    temperature: float,
    clip: float | None,
    one_sided: bool,
    wants_gradient: bool,
) -> None:
    """Makes all row passes over some tokens, with arguments and results of `ogls.loss.chunked.divergence_rows`.

    All tensors are contiguous, and `divergence` and the logits' dtype are such as `knows` knows. A row that is not
    finite is left alone, with value NaN.
    """
    high = math.inf if clip is None else clip
    low = -math.inf if one_sided else -high
    function = getattr(library(), f"rows_{str(logits.dtype).removeprefix('torch.')}")
    tensors = (logits, gaps, values, ids, logprobs) if ids is not None else (logits, gaps, values, None, None)
    function(
        KINDS.index(type(divergence)),
        *(None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        *map(ctypes.c_long, logits.shape),
        ctypes.byref(Options(mixture_weight(divergence), temperature, low, high, wants_gradient)),
    )


def knows(divergence: Divergence, device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether `divergence_rows` makes the passes of this divergence, for logits on `device` in `dtype`."""
    known = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and type(divergence) in KINDS
    return known and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """Returns the functions in C++, which are built where nobody has built them yet; None where that fails."""
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, *FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])]
    key = hashlib.sha256(SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]
    folder = cache_folder()
    built = folder / f"cpu_rows-{key}.so"
    try:
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as own:  # others may build it at the same time
                made = Path(own) / built.name
                subprocess.run([*command, str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True)
                made.replace(built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
        warnings.warn(
            f"the loss takes longer: {SOURCE.name} could not be built by {compiler} in {folder} ({reason}); "
            "install a C++ compiler, or name one in CXX",
            stacklevel=2,
        )
        return None
