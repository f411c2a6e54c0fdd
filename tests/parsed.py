"""Command lines are parsed by one parser, since making it takes as long as its work."""

from __future__ import annotations

from typing import Any, ClassVar

from ogls.cli import OglsCLI, build


class OneParser(OglsCLI):
    """This command line makes its parser once for all tests of a process."""

    _kept: ClassVar[dict[str | None, dict[str, Any]]] = {}

    def setup_parser(self, *settings: Any) -> None:
        if self.asked not in self._kept:
            before = {*vars(self)}
            super().setup_parser(*settings)
            self._kept[self.asked] = {name: value for name, value in vars(self).items() if name not in before}
        vars(self).update(self._kept[self.asked])


class _Parsed(OneParser):
    def instantiate_classes(self) -> None:
        """Makes nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def parsed(arguments: list[str]) -> Any:
    """Returns the configuration that `run.py` has with these arguments; raises SystemExit where it refuses them."""
    made: Any = build(arguments, kind=_Parsed)
    return made.config[arguments[0]]
