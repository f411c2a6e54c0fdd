"""Problems are read from rows with named columns: JSON lines, Hub data sets.

Every row is checked when the source is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from ogls.records import Problem
from ogls.tasks.base import ProblemSource


@dataclass(frozen=True)
class Columns:
    r"""Columns say which column of a row becomes which field of a `Problem`.

    A row needs question and answer; all other columns may be missing.

    Args:
        id: column of the problem's id; a row without one is named by its file and number
        text: column of the question
        answer: column of the gold answer
        solution: column of the reference solution
        system: column of the system message
        kind: column of the problem's kind, which picks the verifier
        default_kind: kind of the rows that name none
        answer_pattern: regular expression whose last match in the answer column has the gold answer as its first group,
            such as ``####\s*(.+)`` where it ends a worked solution; null takes the whole column
    """

    id: str = "id"
    text: str = "problem"
    answer: str = "answer"
    solution: str = "solution"
    system: str = "system"
    kind: str = "kind"
    default_kind: str = "math"
    answer_pattern: str | None = None

    def read(self, rows: Iterable[tuple[int, Any]], source: str) -> tuple[Problem, ...]:
        """Returns the problems of numbered rows.

        Args:
            rows: number and content of every row
            source: name of the rows in messages

        Raises:
            ValueError: a row is malformed, an id is repeated, or there are no rows or no such column; the message names
                source, row and reason.
        """
        first_seen: dict[str, int] = {}
        problems, columns = [], set()
        for number, row in rows:
            where = f"{source}, row {number}"
            if not isinstance(row, Mapping):
                raise ValueError(f"{where}: expected an object with columns, got {type(row).__name__}")
            columns.update(row)
            problem = self._problem(row, where, default_id=f"{Path(source).stem}-{number}")
            if problem.id in first_seen:
                raise ValueError(f"{where}: id {problem.id!r} was already used by row {first_seen[problem.id]}")
            first_seen[problem.id] = number
            problems.append(problem)
        if not problems:
            raise ValueError(f"{source}: expected at least one problem, got none")
        for option in fields(self)[:6]:
            column = str(getattr(self, option.name))
            if column != option.default and column not in columns:
                raise ValueError(f"{source}: no row has the column {column!r} ({option.name}), got {sorted(columns)}")
        return tuple(problems)

    def _problem(self, row: Mapping[str, Any], where: str, default_id: str) -> Problem:
        text, answer = _text(row, self.text, where), _text(row, self.answer, where)
        if self.answer_pattern is not None:
            matches = [found[1] for found in re.finditer(self.answer_pattern, answer)]
            if not matches:
                raise ValueError(f"{where}: {self.answer_pattern!r} matches nothing in {answer[-100:]!r}")
            answer = matches[-1]
        return Problem(
            id=_optional(row, self.id, where) or default_id,
            text=text,
            answer=answer.strip(),
            solution=_optional(row, self.solution, where),
            system=_optional(row, self.system, where),
            kind=_optional(row, self.kind, where) or self.default_kind,
        )


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise ValueError(f"{where}: expected a column {column!r}, got {sorted(row)}")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: expected text in column {column!r}, got {type(value).__name__}")
    value = str(value)
    if not value.strip():
        raise ValueError(f"{where}: column {column!r} is empty")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{where}: column {column!r} holds a lone surrogate, which is not text")
    return value


def _optional(row: Mapping[str, Any], column: str, where: str) -> str | None:
    """Returns the text of a column; None where it is missing, null or empty."""
    return None if row.get(column) in (None, "") else _text(row, column, where)


def _check_slice(offset: int, limit: int | None) -> None:
    if offset < 0 or (limit is not None and limit < 1):
        raise ValueError(f"expected offset >= 0 and limit >= 1 or null, got offset {offset}, limit {limit}")


@dataclass(frozen=True)
class JsonlProblems(ProblemSource):
    """This source reads a file with one JSON object per line.

    Blank lines are skipped. Rows are numbered from 1, as an editor numbers lines.

    Args:
        path: path of the file, relative to the working directory
        limit: largest number of problems; null takes all
        offset: number of problems to skip at the beginning
        columns: names of the columns

    Raises:
        ValueError: there is no such file, or a row is malformed.
    """

    path: str
    limit: int | None = None
    offset: int = 0
    columns: Columns = Columns()
    _problems: tuple[Problem, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_slice(self.offset, self.limit)
        file = Path(self.path)
        if not file.is_file():
            raise ValueError(f"no file of problems at {self.path!r} (working directory {Path.cwd()})")
        with file.open("rb") as stream:
            lines = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
            end = None if self.limit is None else self.offset + self.limit
            rows = ((number, self._json(number, line)) for number, line in islice(lines, self.offset, end))
            object.__setattr__(self, "_problems", self.columns.read(rows, source=self.path))

    def _json(self, number: int, line: bytes) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, row {number}: not JSON: {error}") from error

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]


@dataclass(frozen=True)
class HubProblems(ProblemSource):
    """This source reads a data set of the Hugging Face Hub, or a local folder of parquet, JSON or CSV files.

    No code of the data set is run.

    Args:
        dataset: name of the data set on the Hub, or path of a folder
        split: split of the data set, such as ``train``
        name: configuration of the data set, where it has several
        revision: commit or tag of the data set; with one, the problems stay the same
        limit: largest number of problems; null takes all
        offset: number of problems to skip at the beginning
        columns: names of the columns

    Raises:
        ValueError: a row is malformed.
    """

    dataset: str
    split: str
    name: str | None = None
    revision: str | None = None
    limit: int | None = None
    offset: int = 0
    columns: Columns = Columns()
    _problems: tuple[Problem, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_slice(self.offset, self.limit)
        from datasets import load_dataset

        table = load_dataset(self.dataset, self.name, split=self.split, revision=self.revision)
        end = len(table) if self.limit is None else min(self.offset + self.limit, len(table))
        rows = ((number, table[number]) for number in range(self.offset, end))
        object.__setattr__(self, "_problems", self.columns.read(rows, source=f"{self.dataset}/{self.split}"))

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]
