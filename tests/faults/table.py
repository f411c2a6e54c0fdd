"""The table of faults: what the tests marked `fault` tried, and what came of it.

`make faults` prints it; with `--faults-table=FILE` it is also written, with the tests and their figures, as Markdown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_LIMITS = """
Not promised, and why:

- Bitwise the same run after a kill holds for scripted and replayed rollouts. vLLM on a CPU takes no seed for its
  sampler, so live rollouts are new ones of the same policy.
- An engine that hangs in native code, deaf to signals, is not rebuilt: the process ends with exit code 75, and the run
  goes on from its last checkpoint.
- Processes that share a step need not make equally many micro-batches: their sums are added once a step, so nothing
  waits for anything in between.
- MLflow cannot forget. A step that is made again after a kill is told again only where a figure came out otherwise, as
  with live rollouts: its history then has both, the run's own last. Clocks of such a step are those of the first time.
- Tables of completions and accuracies by problem are in MLflow alone. A run that goes on sends those of its latest
  validation again; where a slow server had not yet taken earlier ones before a kill, they are lost.
- `make audit` says that it could not look a pin up where PyPI's advisories cannot be reached.
"""


@dataclass
class _Row:
    """One kind of fault: its test functions, of which each may have many cases."""

    passed: dict[str, bool] = field(default_factory=dict)  # test function -> whether all its cases passed
    cases: int = 0
    files: dict[str, None] = field(default_factory=dict)  # in order
    figures: list[str] = field(default_factory=list)


_ROWS: dict[str, _Row] = {}
_NOT_RUN: dict[str, str] = {}  # test function of a fault -> why


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-table", type=Path, help="write the table of faults to this file")


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        marks = [name for name in ("slow", "torture") if item.get_closest_marker(name)]
        if item.get_closest_marker("fault") and marks:
            _NOT_RUN[_function(item)] = f"`make {marks[-1]}`"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Puts into the report what the table needs: the process that prints it may be another one."""
    report = yield
    if mark := item.get_closest_marker("fault"):
        properties = {"kind": mark.args[0], "tried": mark.kwargs.get("tried", 1), **dict(item.user_properties)}
        report.fault = {"test": _function(item), **{k: properties.get(k) for k in ("kind", "tried", "figure")}}
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    fault = getattr(report, "fault", None)
    if fault is not None and report.skipped:
        why = report.longrepr[-1] if isinstance(report.longrepr, tuple | list) else report.longrepr
        _NOT_RUN[fault["test"]] = str(why)
    elif fault is not None and (report.when == "call" or report.failed):
        row, name = _ROWS.setdefault(fault["kind"], _Row()), fault["test"]
        row.passed[name] = row.passed.get(name, True) and report.passed
        row.cases += int(fault["tried"])
        row.files[name.partition("::")[0]] = None
        row.figures += [] if fault["figure"] is None else [str(fault["figure"])]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _NOT_RUN.update(getattr(node, "workeroutput", {}).get("not_run", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = _NOT_RUN  # pyright: ignore[reportAttributeAccessIssue]


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0].removeprefix("tests/")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    file = config.getoption("--faults-table")
    if file is None and "fault" not in (config.getoption("markexpr") or ""):
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'kind of fault':<58} {'tests':>6} {'passed':>7} {'cases':>6}")
    for name, row in sorted(_ROWS.items()):
        passed = sum(row.passed.values())
        terminalreporter.write_line(f"{name:<58} {len(row.passed):>6} {passed:>7} {row.cases:>6}")
        for figure in row.figures:
            terminalreporter.write_line(f"    {figure}")
    terminalreporter.write_line(_summary())
    for name, why in sorted(_NOT_RUN.items()):
        terminalreporter.write_line(f"not run: {name} ({why})")
    if file is not None:
        file.write_text(_document(config.getoption("markexpr") or ""))


def _summary() -> str:
    whole = sum(all(row.passed.values()) for row in _ROWS.values())
    tests = sum(len(row.passed) for row in _ROWS.values())
    return f"{len(_ROWS)} kinds of fault, {tests} tests; {whole} kinds survived whole"


def _document(selected: str) -> str:
    lines = [
        "# Faults",
        "",
        f'Made by `pytest -m "{selected}" --faults-table=FILE`: {_summary()}. A test is one way to bring a fault',
        "about; its cases are inputs or moments.",
        "",
        "| kind of fault | tests | passed | cases | figures | files |",
        "|---|---:|---:|---:|---|---|",
    ]
    for name, row in sorted(_ROWS.items()):
        figures, files = "; ".join(row.figures), ", ".join(f"`{file}`" for file in row.files)
        lines.append(f"| {name} | {len(row.passed)} | {sum(row.passed.values())} | {row.cases} | {figures} | {files} |")
    if _NOT_RUN:
        lines += ["", "Not in this run:", "", *(f"- `{name}`: {why}" for name, why in sorted(_NOT_RUN.items()))]
    return "\n".join(lines) + "\n" + _LIMITS
