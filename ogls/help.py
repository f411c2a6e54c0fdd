"""Help texts list every class that a key takes, each with the sentence that says what it is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import jsonargparse._actions
import jsonargparse._typehints
from jsonargparse._util import get_import_path, import_object

import ogls

_all_classes = jsonargparse._typehints.get_all_subclass_paths
_help_of_one = jsonargparse._actions._ActionHelpClassPath.print_help


def list_classes(arguments: Sequence[str]) -> None:
    """Has the help that is asked for list the classes that a key takes: the public ones, and the user's own.

    ``--help`` names them, ``--data.engine.help`` says what each is, ``--data.engine.help VllmEngine`` what that takes.

    Args:
        arguments: words of the command line; without a help among them nothing is done, since it costs time
    """
    if not any(word in ("-h", "--help") or word.partition("=")[0].endswith(".help") for word in arguments):
        return
    for name in ogls.__all__:
        getattr(ogls, name)  # only classes that have been loaded are known
    jsonargparse._typehints.get_all_subclass_paths = _public  # pyright: ignore[reportAttributeAccessIssue]
    jsonargparse._actions._ActionHelpClassPath.print_help = _help  # pyright: ignore[reportAttributeAccessIssue]


def _public(cls: Any, *args: Any, **kwargs: Any) -> list[str]:
    paths = _all_classes(cls, *args, **kwargs)
    return [path for path in paths if not path.startswith("ogls.") or path.removeprefix("ogls.") in ogls.__all__]


def _help(action: Any, call: Sequence[Any]) -> None:
    parser, _, name, option = call
    known = {path.removeprefix("ogls."): import_object(path) for path in _public(action._typehint)}
    base = action._help_types[0]
    if name is not None or set(known) <= {str(get_import_path(base)).removeprefix("ogls.")}:
        return _help_of_one(action, call)
    width = max(map(len, known))
    print(f"{option.removeprefix('--').removesuffix('.help')} takes one of:")
    for path, one in sorted(known.items(), key=lambda entry: entry[0].lower()):
        print(f"  {path:{width}}  {(inspect.getdoc(one) or '').partition(chr(10))[0]}")
    print(f"{option} NAME says what it can be given.")
    parser.exit()
