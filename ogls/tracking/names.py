"""A run's folder is named by method, seed and time, and its line in MLflow by what makes it different."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from hashlib import sha256
from secrets import token_hex

_TITLE_LIMIT = 120  # largest number of characters of a run's name in MLflow
_LABEL_LIMIT = 40  # largest number of characters of the method in a folder's name


def stamp() -> str:
    """Returns the end of a new run's name: the time, and what no other run of this second has."""
    return f"{datetime.now():%y%m%d-%H%M%S}-{token_hex(2)}"


def label(method: str, seed: int) -> str:
    """Returns the beginning of a run's name, made of method and seed: ``OPSD-selection-ErrorSpan-s0``.

    The end of a long name becomes a digest, so that methods whose names begin alike stay apart.
    """
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", method).strip("-.")
    if len(plain) > _LABEL_LIMIT:
        plain = f"{plain[: _LABEL_LIMIT - 7].strip('-')}-{sha256(method.encode()).hexdigest()[:6]}"
    return f"{plain}-s{seed}"


def title(method: str, seed: int, given: Mapping[str, str], command: str = "fit") -> str:
    """Returns a run's name in MLflow: the method's class, the seed and what was given: ``OPSD s3 learning_rate=0.001``.

    A method that is not as published is ``OPSD[...]`` there, and what is no training begins with its command.
    """
    kind, changed, _ = method.partition("[")
    said = [f"{key.rpartition('.')[2]}={value}" for key, value in given.items()]
    first = [] if command == "fit" else [command]
    return " ".join([*first, f"{kind}[...]" if changed else kind, f"s{seed}", *said])[:_TITLE_LIMIT]
