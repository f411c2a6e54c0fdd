"""What a misspelt key may have been meant to be."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches

_CLASS = re.compile(r"class_path '([\w.]+)'")
_UNKNOWN = re.compile(r"(?:--|[Oo]ption '|[Kk]ey ')([\w.]+)")


def suggestion(message: str, known: Iterable[str]) -> str:
    """ "; did you mean 'learning_rate'?" for an error message that names an unknown key, or nothing.

    `known` are keys by their last part; those of the classes that the message names are added.
    """
    names = set(known)
    for path in _CLASS.findall(message):
        module, _, name = path.rpartition(".")
        with suppress(ImportError, AttributeError):  # it may be the class that is misspelt
            names |= set(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    for key in _UNKNOWN.findall(message):
        word = key.rpartition(".")[2]
        close = get_close_matches(word, names, n=1)
        if close and word not in names:
            return f"; did you mean {close[0]!r}?"
    return ""
