"""The table of faults: what the tests marked `fault` tried, and what came of it. `make faults` prints it."""

from __future__ import annotations

from collections import defaultdict

import pytest

_COUNTS: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # tried, survived


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    mark = item.get_closest_marker("fault")
    if mark is not None and (call.when == "call" or report.failed):
        tried = int(dict(item.user_properties).get("tried", 1))
        counts = _COUNTS[mark.args[0]]
        counts[0] += tried
        counts[1] += tried * report.passed
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if "fault" not in config.getoption("markexpr"):
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':<58} {'tried':>6} {'survived':>9} {'lost':>5}")
    for name, (tried, survived) in sorted(_COUNTS.items()):
        terminalreporter.write_line(f"{name:<58} {tried:>6} {survived:>9} {tried - survived:>5}")
