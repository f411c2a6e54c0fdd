"""A configuration error becomes one line that says where, why, and the cure."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches

_KEY = re.compile(r"Parser key \"([\w.]+)\":")
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':")
_UNKNOWN = re.compile(r"(?:--|[Oo]ption '|[Kk]ey ')([\w.]+)")
_OPTION = re.compile(r"Option '\w+' is not accepted")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\w+)")
_REQUIRED = re.compile(r"the following arguments are required: .*")
_STRUCTURE = {"class_path", "init_args"}
_FOR_EVALUATION = (
    "; a budget of thoughts is for evaluation alone, data.evaluation.sampling.thinking_token_budget: in training, "
    "tokens that an engine forces would be learned as if they were the student's own"
)
_TYPE = re.compile(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>(?:\. Got value: (.*))?")
_GIVEN = re.compile(r"Given value: (.{1,60})")
_NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>|Expected a path"
)


def in_one_line(message: str, keys: Iterable[str], classes: Iterable[str]) -> str:
    """Returns a parser's message as one line, such as ``method.selection: there is no class 'ErorSpan'; did you ...?``.

    Args:
        message: message of jsonargparse, several nested lines
        keys: last parts of all known keys; those of the classes that the message names are added
        classes: names of all known classes
    """
    if _REQUIRED.fullmatch(message.strip()):
        return "no configuration: expected --config FILE, such as math.yaml, or config.yaml of a run's folder"
    return one_line(message) + suggestion(message, keys, classes)


def one_line(message: str) -> str:
    """Returns the same without a suggestion."""
    path: list[str] = []
    owner, given, reasons = "", "", []
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if found := _KEY.fullmatch(line):
            path.append(found[1])
            owner = ""
        elif found := _CLASS.fullmatch(line):
            owner = found[1].rpartition(".")[2]
        elif found := _GIVEN.fullmatch(line):
            given = given or found[1]
        elif line and not _NOISE.match(line):
            reasons.append(_NO_CLASS.sub(r"there is no class '\1'", line))
    where = ".".join(path) + (f" ({owner})" if owner else "")
    told = [reason for reason in reasons if not _TYPE.fullmatch(reason)] or [_expected(r, given) for r in reasons[:1]]
    # Where a key takes one of several types, each says why it was none of them; a misspelt option says most.
    told = [reason for reason in told if _OPTION.match(reason)] or told
    said = "; ".join(dict.fromkeys(told)) or " ".join(message.split())
    return f"{where.strip()}: {said}" if where else said


def _expected(reason: str, given: str) -> str:
    """Returns ``expected int, got many`` for a value of another type than the key's."""
    found = _TYPE.fullmatch(reason)
    if found is None:
        return reason
    got = found[2] or given
    cure = " (a text that looks like something else needs quotes)" if found[1] == "str" else ""
    return f"expected {found[1]}" + (f", got {got}" if got else "") + cure


def suggestion(message: str, keys: Iterable[str], classes: Iterable[str] = ()) -> str:
    """Returns ``; did you mean 'learning_rate'?`` for a message with an unknown key or class, or an empty text.

    A budget of thoughts is unknown wherever training rollouts are drawn: what is returned for it is the reason.

    Args:
        message: message of jsonargparse
        keys: last parts of all known keys
        classes: names of all known classes
    """
    if (found := _NO_CLASS.search(message)) and not _OPTION.search(message):
        return _meant(found[1], classes)
    if any(key.endswith("thinking_token_budget") for key in _UNKNOWN.findall(message)):
        return _FOR_EVALUATION
    names = set(keys)
    for path in _CLASS.findall(message):
        module, _, name = path.rpartition(".")
        with suppress(ImportError, AttributeError):  # the class itself may be misspelt
            names |= set(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    for key in sorted(_UNKNOWN.findall(message), key=lambda key: "." in key):
        for word in key.split("."):  # the parser names a key below the misspelt one
            if word not in names | _STRUCTURE and (meant := _meant(word, names)):
                return meant
    return ""


def _meant(word: str, names: Iterable[str]) -> str:
    known = sorted(names)
    close = [name for name in known if name.lower() == word.lower()] or get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
