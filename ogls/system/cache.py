"""What is computed once on a machine is kept in one folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns the folder that the environment variable `OGLS_CACHE` names, or else ~/.cache/ogls."""
    return Path(os.environ.get("OGLS_CACHE") or Path.home() / ".cache" / "ogls")
