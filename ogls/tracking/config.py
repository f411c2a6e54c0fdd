"""The resolved configuration: as a file, as parameters, and as what a run is."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

_NOT_PARAMETERS = ("trainer.logger", "trainer.callbacks", "config", "ckpt_path", "weights_only", "allow_changes")
_MAY_CHANGE = (  # while a run is interrupted: how long it goes on, and what it costs, not what it computes
    *("trainer.max_epochs", "trainer.max_time", "trainer.enable_progress_bar", "trainer.profiler"),
    *("trainer.default_root_dir", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *(
        "data.grading_workers",
        "data.predict_file",
        "data.evaluation.show",
        "policy.gradient_checkpointing",
        "model.tokens_per_micro_batch",
    ),
    *("data.engine.memory_gib", "data.engine.max_num_seqs", "data.engine.enforce_eager", "data.engine.batch_size"),
    *("data.engine.urls", "data.engine.folder", "data.engine.answer_within", "data.engine.start_within"),
)


def parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a configuration by dotted name, without logger, callbacks and the Trainer's defaults."""
    from lightning import Trainer

    known = {f"trainer.{name}": key.default for name, key in inspect.signature(Trainer).parameters.items()}
    leaves = {name: value for name, value in flatten(config).items() if not name.startswith(_NOT_PARAMETERS)}
    return {name: value for name, value in leaves.items() if name not in known or known[name] != value}


def given(arguments: Sequence[str]) -> dict[str, str]:
    """Returns what arguments of the command line change of their first configuration, by dotted key.

    The method's class is left out, and so are seed, logger and what may change on the way.
    """
    found: dict[str, str] = {}
    first: dict[str, str] | None = None
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if not flag.startswith("-") or flag == "--allow_changes":  # which takes no value
            continue
        value = value if equals else next(words, "")
        if flag in ("--config", "-c"):
            inline = value.lstrip().startswith("{")
            content = yaml.safe_load(value if inline else Path(value).read_text()) or {}
            said = {name: str(leaf) for name, leaf in flatten(content).items()}
            if first is None:
                first = said
                continue
        else:
            name = flag.removeprefix("--").replace(".init_args", "").removesuffix(".class_path")
            said = {name: str(leaf) for name, leaf in flatten({name: _part(value)}).items()}
        found |= said
    before = first or {}
    if found.get("method", before.get("method")) != before.get("method"):  # another method has nothing of the first
        before = {name: value for name, value in before.items() if not name.startswith("method.")}
    hidden = (*_NOT_PARAMETERS, "seed_everything")
    shown = {name: value for name, value in found.items() if name != "method" and not name.startswith(hidden)}
    shown = {name: value for name, value in shown.items() if before.get(name) != value}
    return {name: value for name, value in shown.items() if name == "trainer.max_epochs" or name not in _MAY_CHANGE}


def _part(value: str) -> Any:
    """Returns a part of a configuration that is written as JSON; of all else the text."""
    with suppress(ValueError):
        return json.loads(value) if value.startswith("{") else value
    return value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns leaves by dotted name. ``k: {class_path: a.B, init_args: {x: 1}}`` becomes ``k: B`` and ``k.x: 1``."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and "class_path" in value:
            leaves[name] = str(value["class_path"]).rpartition(".")[2]
            value = value.get("init_args") or {}
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns what makes two runs different, ``key: this there, that here``, but for what may change on the way.

    An option that one of them lacks and that is null in the other is none: it came with a later version.
    """
    names = [name for name in dict.fromkeys([*before, *now]) if name not in _MAY_CHANGE]
    return [
        f"{name}: {before.get(name, 'nothing')} there, {now.get(name, 'nothing')} here"
        for name in names
        if before.get(name, "None") != now.get(name, "None")
    ]
