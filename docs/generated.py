"""Pages that are made of what the code says of itself: methods, keys, classes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import ogls
from ogls import methods
from ogls.data import RolloutDataModule
from ogls.methods import Method
from ogls.module import SelfDistillation
from ogls.policy.policy import Policy
from ogls.tracking import Tracker

ROOT = Path(__file__).parents[1]
_NAMES = sorted({*methods.__all__} - {"Method"})
_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Example|Examples|Note):$")


def write(folder: Path) -> None:
    """Writes all pages into `folder`, which is emptied first."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    pages = {"methods.md": "".join(_methods()), "keys.md": "".join(_keys()), "api.rst": "".join(_api())}
    pages |= {f"{name}.rst": "".join(_method(getattr(methods, name))) for name in _NAMES}
    for name, text in pages.items():
        (folder / name).write_text(text)


def formulas(lines: list[str]) -> None:
    """Marks the indented paragraphs of a docstring as formulas, which are shown as they are typed."""
    made: list[str] = []
    section = literal = False
    for line in lines:
        indented = line.startswith("    ")
        if line.strip() and not indented:
            section, literal = bool(_SECTION.match(line)), False
        if indented and not section and not literal and (not made or not made[-1].strip()):
            made += ["::", ""]
            literal = True
        made.append(line)
    lines[:] = made


def _configurations(method: type[Method]) -> list[str]:
    """Returns the configurations in `experiments` that name a method."""
    named = rf"method:\s*({method.__module__}\.)?{method.__name__}\s*$"
    return [
        file.name for file in sorted((ROOT / "experiments").glob("*.yaml")) if re.search(named, file.read_text(), re.M)
    ]


def _methods() -> Iterator[str]:
    yield "# Methods\n\nA method is a set of independent choices. A preset is a paper: a class whose defaults are what "
    yield "the paper chose. `--method OPSD` takes it whole, `--method.selection ErrorSpan` changes one choice of it, "
    yield "and the name of what runs says so: `OPSD[selection=ErrorSpan]`.\n\n| preset | what it is |\n|---|---|\n"
    for name in _NAMES:
        yield f"| [{name}]({name}.rst) | {_first_sentence(getattr(methods, name))} |\n"
    yield "\n```{toctree}\n:hidden:\n" + "\n".join(_NAMES) + "\n```\n"


def _method(method: type[Method]) -> Iterator[str]:
    yield f"{method.__name__}\n{'=' * len(method.__name__)}\n\n.. code-block:: sh\n\n"
    yield f"   python experiments/run.py fit --config math.yaml --method {method.__name__}\n\n"
    if files := _configurations(method):
        yield f"Named in {', '.join(f'``experiments/{file}``' for file in files)}.\n\n"
    yield f".. autoclass:: {method.__module__}.{method.__name__}\n   :no-members:\n\n"
    yield ".. list-table:: Its choices\n   :header-rows: 1\n\n   * - choice\n     - default\n"
    made = method()
    for field in fields(method):
        yield f"   * - {field.name}\n     - ``{getattr(made, field.name)!r}``\n"


def _first_sentence(of: Any) -> str:
    text = " ".join((inspect.getdoc(of) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".").replace("|", "\\|")


def _keys() -> Iterator[str]:
    """A table of every key of a configuration, with the part of the command line that it belongs to."""
    yield "# Keys\n\nEvery key of a configuration, as `--KEY VALUE` on the command line. What takes a class takes its "
    yield "name, and the keys of that class below it: `--data.engine VllmEngine --data.engine.kv_cache_dtype fp8`. The "
    yield "classes and their keys are in the [reference of Python names](api.rst).\n\n"
    for section, actions in _sections():
        yield f"## {section}\n\n| key | default | |\n|---|---|---|\n"
        for key, default, about in actions:
            yield f"| `{key}` | {default} | {about} |\n"
        yield "\n"


def _sections() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    kinds = {"method": Method, "policy": Policy, "model": SelfDistillation, "data": RolloutDataModule}
    for section, kind in (kinds | {"trainer.logger.init_args": Tracker}).items():
        about = _arguments(kind)
        rows = []
        for name, parameter in inspect.signature(kind).parameters.items():
            if name in ("policy", "method", "self"):
                continue
            default = "required" if parameter.default is inspect.Parameter.empty else f"`{_shown(parameter.default)}`"
            rows.append((f"{section}.{name}", default, about.get(name, "").replace("|", "\\|")))
        yield section, rows


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _arguments(kind: type) -> dict[str, str]:
    """Returns what the docstring of a class says of each argument."""
    text = inspect.getdoc(kind) or ""
    found = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.M)
    if found is None:
        return {}
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", found[1], re.M)
    return {name: " ".join(about.split()) for name, about in entries}


def _api() -> Iterator[str]:
    yield "Python names\n============\n\nAll of these are ``ogls.NAME``.\n\n"
    for module in dict.fromkeys(ogls._PLACES):
        names = ogls._PLACES[module].split()
        if module == "ogls.methods":
            names = ["Method"]
        yield f"{module}\n{'-' * len(module)}\n\n{_first_sentence(import_module(module))}.\n\n"
        for name in names:
            of = getattr(import_module(module), name)
            directive = "autoclass" if inspect.isclass(of) else "autofunction" if callable(of) else "autodata"
            yield f".. {directive}:: {module}.{name}\n\n"
