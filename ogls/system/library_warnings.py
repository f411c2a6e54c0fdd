"""Warnings of libraries go into a file of the run, and one line of the terminal says how many there are."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

FILE = "warnings.log"
_OWN = Path(__file__).resolve().parents[1]


class LibraryWarnings:
    """While this context is entered, what libraries warn of is kept from the terminal.

    It is written to `warnings.log` in a run's folder as soon as there is one. Without a run, all of it is shown at the
    end. Warnings of the project itself are shown at once.
    """

    def __init__(self) -> None:
        self.folder: Callable[[], Path | None] = lambda: None
        """Function that gives the run's folder, which need not exist yet."""
        self._kept: list[str] = []
        self._num_written = 0

    def __enter__(self) -> LibraryWarnings:
        self._shown, warnings.showwarning = warnings.showwarning, self._keep
        return self

    def _keep(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if file is not None or Path(filename).is_relative_to(_OWN):
            self._shown(message, category, filename, lineno, file, line)
            return
        self._kept.append(warnings.formatwarning(message, category, filename, lineno, line))
        self._write()

    def _write(self) -> Path | None:
        """Adds what is new to the file, and returns its path; None where it cannot be written yet."""
        folder = self.folder()
        if folder is None or not folder.is_dir():
            return None
        try:
            with (folder / FILE).open("a") as out:
                out.writelines(self._kept[self._num_written :])
        except OSError:  # a full disk: they are shown at the end
            return None
        self._num_written = len(self._kept)
        return folder / FILE

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        warnings.showwarning = self._shown
        if not self._kept:
            return
        if file := self._write():
            count = "a warning" if len(self._kept) == 1 else f"{len(self._kept)} warnings"
            print(f"{count} of libraries: see {file}", file=sys.stderr, flush=True)
        else:
            sys.stderr.writelines(self._kept[self._num_written :])
