"""Command lines are parsed by one parser, since making it takes as long as its work. Nothing is made of the values."""

from __future__ import annotations

from typing import Any, ClassVar

from ogls.cli import OglsCLI, build


class _Parsed(OglsCLI):
    _kept: ClassVar[dict[str | None, tuple[Any, ...]]] = {}

    def setup_parser(self, *settings: Any) -> None:
        if self.asked not in self._kept:
            super().setup_parser(*settings)
            self._kept[self.asked] = self.parser, self._subcommand_parsers
        self.parser, self._subcommand_parsers = self._kept[self.asked]

    def instantiate_classes(self) -> None:
        """Makes nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def parsed(arguments: list[str]) -> Any:
    """Returns the configuration that `run.py` has with these arguments; raises SystemExit where it refuses them."""
    made: Any = build(arguments, kind=_Parsed)
    return made.config[arguments[0]]
