"""Every random draw is a function of its purpose, never of earlier draws."""

from __future__ import annotations

import hashlib


def derive(*parts: int | str) -> int:
    """Returns a 63-bit seed for a path of names and numbers, such as ``derive(run_seed, "rollout", step)``.

    Two different paths give independent seeds. A resumed run gives the same seeds, because no state is carried over.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
