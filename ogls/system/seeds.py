"""Randomness by counters: every draw is a function of what it is for, never of what was drawn before it."""

from __future__ import annotations

import hashlib


def derive(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, e.g. ``derive(run_seed, "rollout", step)``.

    Two different paths give independent seeds, and a resumed run gives the same ones, because nothing is carried over.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
