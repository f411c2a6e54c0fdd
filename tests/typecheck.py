"""The run-time type checker of the tests (pyproject's `--jaxtyping-packages`): an int is a float, as pyright has it."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
