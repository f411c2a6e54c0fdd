"""The table of faults: what the tests marked `fault` tried, and what came of it.

`make faults` prints it; with `--faults-table=FILE` it is also written, with the tests and their figures, as Markdown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

_LIMITS = """
Not promised, and why:

- Bitwise the same run after a kill holds for scripted and replayed rollouts. vLLM on a CPU takes no seed for its
  sampler, so live rollouts are new ones of the same policy.
- An engine that hangs in native code, deaf to signals, is not rebuilt: the process ends with exit code 75, and the run
  goes on from its last checkpoint.
- Processes that share a step need not make equally many micro-batches: their sums are added once a step, so nothing
  waits for anything in between.
- `make audit` says that it could not look a pin up where PyPI's advisories cannot be reached.
"""


@dataclass
class _Row:
    tried: int = 0
    survived: int = 0
    files: dict[str, None] = field(default_factory=dict)  # in order
    figures: list[str] = field(default_factory=list)


_ROWS: dict[str, _Row] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-table", type=Path, help="write the table of faults to this file")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    mark = item.get_closest_marker("fault")
    if mark is not None and (call.when == "call" or report.failed):
        properties = dict(item.user_properties)
        tried = int(properties.get("tried", mark.kwargs.get("tried", 1)))
        row = _ROWS.setdefault(mark.args[0], _Row())
        row.tried += tried
        row.survived += tried * report.passed
        row.files[item.nodeid.partition("::")[0].removeprefix("tests/")] = None
        row.figures += [str(properties["figure"])] if "figure" in properties else []
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if "fault" not in config.getoption("markexpr"):
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':<58} {'tried':>6} {'survived':>9} {'lost':>5}")
    for name, row in sorted(_ROWS.items()):
        lost = row.tried - row.survived
        terminalreporter.write_line(f"{name:<58} {row.tried:>6} {row.survived:>9} {lost:>5}")
        for figure in row.figures:
            terminalreporter.write_line(f"    {figure}")
    file = config.getoption("--faults-table")
    if file is not None:
        file.write_text(_document(config.getoption("markexpr")))


def _document(selected: str) -> str:
    lines = [
        "# Faults",
        "",
        f'Made by `pytest -m "{selected}" --faults-table=FILE`.',
        "",
        "| fault | tried | survived | lost | figures | tests |",
        "|---|---:|---:|---:|---|---|",
    ]
    for name, row in sorted(_ROWS.items()):
        figures, files = "; ".join(row.figures), ", ".join(f"`{file}`" for file in row.files)
        lines.append(f"| {name} | {row.tried} | {row.survived} | {row.tried - row.survived} | {figures} | {files} |")
    return "\n".join(lines) + "\n" + _LIMITS
