"""Recipes are what runs are made of: configurations and arguments, under the names that methods derive."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from ogls.cli import build, find_configs
from ogls.methods import Method

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe is all that makes a run, but for its seed.

    Args:
        config: configuration at the bottom of the stack
        overlays: names of the configurations on top of it, without ``.yaml``
        arguments: further words of the command line
    """

    config: str
    overlays: tuple[str, ...]
    arguments: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """Returns the options that name the configuration files."""
        names = [self.config, *(f"{overlay}.yaml" for overlay in self.overlays)]
        return [word for name in names for word in ("--config", name)]

    @property
    def text(self) -> str:
        """Returns the overlays in one word."""
        return "+".join(self.overlays)

    @cached_property
    def digest(self) -> str:
        """Returns a digest of what the files say and of the arguments: the tag by which a run is known again."""
        return digest_of([*self.files, *self.arguments])

    @cached_property
    def name(self) -> str:
        """Returns the name that the method derives from its choices; its runs carry it as the tag `method`.

        The command line is parsed as a run parses it. Neither data sets nor weights are read.
        """
        sys.argv[1:] = ["fit", *self.files, *self.arguments, "--print_config"]
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                build()
        except SystemExit as stopped:
            if stopped.code:
                print(f"in the recipe {self.text}", file=sys.stderr)
                raise
        parser = ArgumentParser()
        parser.add_argument("--method", type=Method)
        return parser.instantiate(
            parser.parse_object({"method": yaml.safe_load(printed.getvalue())["method"]})
        ).method.name

    def command(self, seed: int, experiment: str, tracking_uri: str) -> list[str]:
        """Returns the command of the run with this seed."""
        logger = {"experiment": experiment, "tracking_uri": tracking_uri, "tags": f'{{"recipe": "{self.digest}"}}'}
        return [*fit_command([*self.files, "--seed_everything", str(seed)], logger), *self.arguments]


def fit_command(words: Sequence[str], logger: Mapping[str, object]) -> list[str]:
    """Returns the command of a run of these words, with arguments of its logger behind them."""
    arguments = [part for name, value in logger.items() for part in (f"--trainer.logger.init_args.{name}", f"{value}")]
    return [sys.executable, str(PROJECT / "experiments" / "run.py"), "fit", *words, *arguments]


def digest_of(words: Sequence[str]) -> str:
    """Returns a digest of what a command line's configuration files say and of all its other words.

    Comments and the order of keys are nothing that a file says.

    Args:
        words: words of the command line, each file behind a ``--config`` of its own
    """
    found, said, others = iter(find_configs(list(words))), [], []
    for word in found:
        if word == "--config":
            said.append(json.dumps(yaml.safe_load(Path(next(found)).read_text(encoding="utf-8")), sort_keys=True))
        else:
            others.append(word)
    return hashlib.sha256("\x1f".join([*said, *others]).encode()).hexdigest()[:12]


def stack_of(recipe: str) -> tuple[str, ...]:
    """Returns the overlays of a recipe as it is written on the command line."""
    return tuple(name.removesuffix(".yaml") for name in recipe.split()[0].split("+"))


def arguments_of(recipe: str) -> tuple[str, ...]:
    """Returns the arguments that are written behind the overlays of a recipe, --name=value as --name and value."""
    words = shlex.split(recipe)[1:]
    return tuple(part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word]))


def recipes(
    config: str, methods: Sequence[str], overlays: Sequence[str] = (), arguments: Sequence[str] = ()
) -> dict[str, Recipe]:
    """Returns the recipes by how they are written; `overlays` and `arguments` come on top of every recipe's own."""
    made = {}
    for method in methods:
        own, further = stack_of(method), arguments_of(method)
        stack = (*own, *(name for overlay in overlays for name in stack_of(overlay)))
        key = shlex.join(["+".join(own), *further])
        made[key] = Recipe(config=config, overlays=stack, arguments=(*further, *arguments))
    return made


def labels(names: Mapping[str, str]) -> dict[str, str]:
    """Returns what tables and figures call each recipe: no two recipes alike.

    That is the name of its method; where several recipes have this name, with those of its overlays and arguments in
    parentheses that are not common to all of them.

    Args:
        names: name of the method of each recipe, by how the recipe is written
    """
    sharing: dict[str, list[str]] = defaultdict(list)
    for key, name in names.items():
        sharing[name].append(key)
    found = {}
    for name, keys in sharing.items():
        parts = {key: _parts(key) for key in keys}
        common = set.intersection(*map(set, parts.values()))
        own = {key: tuple(part for part in parts[key] if part not in common) for key in keys}
        if len(set(own.values())) < len(keys):  # the same overlays in another order
            own = parts
        found |= {key: f"{name} ({_shown(own[key])})" if own[key] else name for key in keys}
    return found


def _parts(key: str) -> tuple[str, ...]:
    words = arguments_of(key)
    options = (f"{name.rpartition('.')[2]}={value}" for name, value in zip(words[::2], words[1::2], strict=True))
    return (*stack_of(key), *options)


def _shown(parts: Sequence[str]) -> str:
    overlays, options = [p for p in parts if "=" not in p], [p for p in parts if "=" in p]
    return ", ".join(["+".join(overlays)] * bool(overlays) + options)
