"""A configuration file means what it shows: what YAML would drop, repeat or blow up in silence is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_dumper, set_loader
from jsonargparse._loaders_dumpers import set_omegaconf_loader

_MAX_DEPTH = 50  # of brackets in brackets
_MAX_NODES = 10_000  # after every alias has been put in full
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class _Open:
    """An open collection is a mapping or a list whose end has not come yet."""

    anchor: str | None
    keys: set[str] | None = None  # seen so far; None for a list
    awaits_key: bool = True
    nodes: int = 1


class _Dumper(yaml.SafeDumper):
    """This dumper puts texts such as 12e4 in quotes: the loader takes them for numbers, YAML's own dumper does not."""


_FLOAT = re.compile(r"[-+]?[\d_.]+[eE][-+]?\d+")
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_strictly(mode: str) -> None:
    """Has jsonargparse check every YAML text that it reads, and keep every text that it reads or writes.

    Args:
        mode: one of jsonargparse's modes with OmegaConf
    """
    set_omegaconf_loader(mode)
    load = get_loader(mode)

    def checked(text: str) -> Any:
        check_yaml(text)
        value = load(text)
        return text if value is None and text.strip() != "null" else value  # `# Title` is a comment to YAML

    set_loader(mode, checked, (yaml.YAMLError,))
    set_dumper("yaml", lambda values: yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False))


def find_config(name: str, folder: Path) -> str:
    """Returns the path of a configuration that can be read and is what it shows; a text in braces is one itself.

    Args:
        name: name of its file, in the working directory or else in `folder`
        folder: folder with the project's configurations

    Raises:
        ValueError: there is no such file, or it is no configuration.
    """
    if name.lstrip().startswith("{"):
        return name
    places = [Path(name), folder / name]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"--config {name}: no such file; looked for {' and '.join(map(str, places))}")
    try:
        is_config = check_yaml(file.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}, {_in_a_line(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not is_config:
        raise ValueError(f"{file}: expected keys with their values, such as model: {{learning_rate: 1.0e-4}}")
    return str(file)


def check_yaml(text: str) -> bool:
    """Reads a YAML text once, building nothing, and returns whether it is a mapping.

    Raises:
        yaml.YAMLError: the text is not YAML, gives a key of a mapping twice, has an alias within itself, or is far too
            deep or too large once its aliases are put in full; or it quotes the word null, which would mean nothing.
    """
    open_, sizes, is_config = [_Open(None)], {}, None
    for event in yaml.parse(text, Loader=_LOADER):
        top = open_[-1]
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            open_.pop()
            open_[-1].nodes += top.nodes
            if top.anchor:
                sizes[top.anchor] = top.nodes
            _count(open_[-1], event)
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        if top.keys is not None:
            if top.awaits_key and isinstance(event, yaml.ScalarEvent):
                if event.value in top.keys:
                    raise _wrong(f"the key {event.value!r} is given twice", event)
                top.keys.add(event.value)
            top.awaits_key = not top.awaits_key
        if isinstance(event, yaml.CollectionStartEvent):
            if len(open_) > _MAX_DEPTH:
                raise _wrong(f"more than {_MAX_DEPTH} levels", event)
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            is_config = is_mapping if is_config is None else is_config
            open_.append(_Open(event.anchor, set() if is_mapping else None))
        elif isinstance(event, yaml.AliasEvent):
            if any(each.anchor == event.anchor for each in open_):
                raise _wrong(f"*{event.anchor} stands within &{event.anchor}, which would have no end", event)
            top.nodes += sizes.get(event.anchor, 1)
        else:
            top.nodes += 1
            if isinstance(event, yaml.ScalarEvent) and event.value == "null" and event.style in ("'", '"'):
                raise _wrong("the text 'null' would be read as nothing: write null without quotes", event)
        _count(top, event)
    return bool(is_config)


def _count(top: _Open, event: Any) -> None:
    if top.nodes > _MAX_NODES:
        raise _wrong(f"more than {_MAX_NODES} values once every alias is put in full", event)


def _wrong(what: str, event: Any) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {event.start_mark.line + 1}: {what}")


def _in_a_line(error: yaml.YAMLError) -> str:
    """Returns what is wrong with a text, as ``line 3: found character '\\t' that cannot start any token``."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return " ".join((f"line {mark.line + 1}: {problem}" if mark else problem).split())
