"""Problems are read from files and Hub data sets, row by row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ogls.records import Problem
from ogls.tasks.base import ProblemSource
from ogls.tasks.columns import Columns


def _check_slice(offset: int, limit: int | None) -> None:
    if offset < 0 or (limit is not None and limit < 1):
        raise ValueError(f"expected offset >= 0 and limit >= 1 or null, got offset {offset}, limit {limit}")


def _opened(path: str) -> io.BufferedReader | gzip.GzipFile:
    """Returns the file, decompressed where it is gzip."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no file of problems at {path!r} (working directory {Path.cwd()})")
    with file.open("rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else file.open("rb")


@dataclass(frozen=True)
class JsonlProblems(ProblemSource):
    """This source reads a file with one JSON object per line, or one JSON array of objects; gzip or not.

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
        end = None if self.limit is None else self.offset + self.limit
        try:
            with _opened(self.path) as stream:
                rows = islice(self._rows(stream), self.offset, end)
                object.__setattr__(self, "_problems", self.columns.read(rows, source=self.path))
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.path}: damaged gzip: {error}") from error

    def _rows(self, stream: io.BufferedReader | gzip.GzipFile) -> Iterator[tuple[int, Any]]:
        numbered = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
        first = next(numbered, None)
        if first is None:
            return
        if first[1].startswith(b"PAR1") or re.search(r"\.(?:csv|tsv|parquet)(?:\.gz)?$", self.path):
            raise ValueError(
                f"{self.path} is no JSON: HubProblems reads it, with class_path: HubProblems, "
                f"init_args: {{dataset: {self.path}, split: train}}"
            )
        if first[1].lstrip().startswith(b"["):
            array = self._json(first[0], first[1] + stream.read())
            yield from enumerate(array, start=1)
            return
        yield first[0], self._json(*first)
        yield from ((number, self._json(number, line)) for number, line in numbered)

    def _json(self, number: int, line: bytes) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.path}, row {number}: not JSON: {error} (expected one object per line, or one array; "
                "HubProblems reads CSV and parquet)"
            ) from error

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]


@dataclass(frozen=True)
class HubProblems(ProblemSource):
    """This source reads a data set of the Hugging Face Hub, or a local folder or file of parquet, JSON or CSV.

    No code of the data set is run. The cells of a CSV or TSV file, gzip or not, are text as it stands there.

    Args:
        dataset: name of the data set on the Hub, or path of a folder or a file
        split: split of the data set, such as ``train``; a file is one split, whatever it is called
        name: configuration of the data set, where it has several
        revision: commit or tag of the data set; with one, the problems stay the same
        limit: largest number of problems; null takes all
        offset: number of problems to skip at the beginning
        columns: names of the columns

    Raises:
        ValueError: there is no such data set, or a row is malformed.
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
        end = None if self.limit is None else self.offset + self.limit
        source = self.dataset if Path(self.dataset).is_file() else f"{self.dataset}/{self.split}"
        object.__setattr__(self, "_problems", self.columns.read(islice(self._rows(), self.offset, end), source=source))

    def _rows(self) -> Iterator[tuple[int, Any]]:
        found = re.search(r"\.(csv|tsv|parquet|jsonl?)(?:\.gz)?$", self.dataset)
        if found and found[1] in ("csv", "tsv"):
            yield from _cells(self.dataset, "\t" if found[1] == "tsv" else ",")
            return
        from datasets import load_dataset

        try:
            if found and Path(self.dataset).is_file():
                builder = "parquet" if found[1] == "parquet" else "json"
                table = load_dataset(builder, data_files={self.split: self.dataset}, split=self.split)
            else:
                table = load_dataset(self.dataset, self.name, split=self.split, revision=self.revision)
        except Exception as error:  # of many libraries, all about what was asked for
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{self.dataset}, split {self.split!r}: {said}") from error
        for number in range(len(table)):
            yield number, table[number]

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]


def _cells(path: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Returns the rows of a CSV file from 1 on, by the names in its first line."""
    try:
        with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream, delimiter=delimiter, strict=True), start=1):
                if None in row:
                    raise ValueError(f"{path}, row {number}: more cells than the first line has names")
                yield number, {name: cell for name, cell in row.items() if cell is not None}
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: no table of text: {error}") from error
