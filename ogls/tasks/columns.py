"""Columns say which part of a row is the question, the answer, the id; every row is checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ogls.records import Problem

_USUAL = {  # what real data sets call it, the likeliest first
    "text": "question prompt problem query input instruction messages",
    "answer": "answer ground_truth reward_model.ground_truth final_answer Answer target label output",
    "solution": "solution rationale reasoning",
    "id": "id uuid index extra_info.index",
    "system": "system",
    "kind": "kind",
}


@dataclass(frozen=True)
class Columns:
    r"""Columns say which column of a row becomes which field of a `Problem`.

    A row needs question and answer; all other columns may be missing. A dot leads into a nested column, such as
    ``reward_model.ground_truth`` or ``messages.0.content``. A question may be a list of messages: one of the user, and
    before it perhaps one of the system. An answer may be a list; all of its elements are asked for.

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
                source, row, reason and the key that cures it.
        """
        first_seen: dict[str, int] = {}
        problems: list[Problem] = []
        lacking = {option.name for option in fields(self)[:6] if getattr(self, option.name) != option.default}
        columns: set[str] = set()
        for number, row in rows:
            where = f"{source}, row {number}"
            if not isinstance(row, Mapping):
                raise ValueError(f"{where}: expected an object with columns, got {type(row).__name__}")
            columns.update(map(str, row))
            lacking = {option for option in lacking if _found(row, getattr(self, option)) is _ABSENT}
            problem = self._problem(row, where, default_id=f"{_stem(source)}-{number}")
            if problem.id in first_seen:
                raise ValueError(
                    f"{where}: id {problem.id!r} was already used by row {first_seen[problem.id]}; "
                    "take another column with columns: {id: NAME}"
                )
            first_seen[problem.id] = number
            problems.append(problem)
        if not problems:
            raise ValueError(f"{source}: expected at least one problem, got none")
        for option in sorted(lacking):
            raise ValueError(
                f"{source}: no row has the column {getattr(self, option)!r} ({option}), got {sorted(columns)}; "
                f"mend columns: {{{option}: {getattr(self, option)}}}"
            )
        return tuple(problems)

    def _problem(self, row: Mapping[str, Any], where: str, default_id: str) -> Problem:
        text, told = self._prompt(row, where)
        answer = self._text(row, "answer", where)
        if self.answer_pattern is not None:
            matches = [found[1] for found in re.finditer(self.answer_pattern, answer)]
            if not matches:
                raise ValueError(
                    f"{where}: {self.answer_pattern!r} matches nothing in {answer[-100:]!r}; "
                    "mend columns: {answer_pattern: ...}"
                )
            answer = matches[-1]
        system = self._optional(row, "system", where)
        if system is not None and told is not None and system != told:
            raise ValueError(
                f"{where}: column {self.system!r} and the messages in {self.text!r} have different system messages; "
                f"keep the column's with columns: {{text: {self.text}.1.content}}"
            )
        return Problem(
            id=self._optional(row, "id", where) or default_id,
            text=text,
            answer=answer.strip(),
            solution=self._optional(row, "solution", where),
            system=system or told,
            kind=self._optional(row, "kind", where) or self.default_kind,
        )

    def _prompt(self, row: Mapping[str, Any], where: str) -> tuple[str, str | None]:
        """Returns the user's text, and the system's where the column holds messages."""
        value = _found(row, self.text)
        messages = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
        if not messages or not all(isinstance(message, Mapping) and "role" in message for message in messages):
            return self._text(row, "text", where), None
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["system", "user"], ["developer", "user"]):
            raise ValueError(
                f"{where}: expected messages of the user alone, or of system and user, in column {self.text!r}, got "
                f"{roles}; take one with columns: {{text: {self.text}.{max(0, len(roles) - 1)}.content}}"
            )
        said = [self._checked(_content(message), "text", where) for message in messages]
        return said[-1], said[0] if len(said) > 1 else None

    def _text(self, row: Mapping[str, Any], option: str, where: str) -> str:
        value = _found(row, getattr(self, option))
        if value is _ABSENT:
            column = getattr(self, option)
            raise ValueError(f"{where}: expected a column {column!r}, got {sorted(map(str, row))}{_cure(row, option)}")
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        if listed and len(value) == 1:
            value = value[0]
        elif listed and option == "answer" and value and all(_is_text(element) for element in value):
            value = ", ".join(map(str, value))
        if isinstance(value, float) and value != value and option != "answer":  # NaN; as an answer, it is told later
            raise ValueError(
                f"{where}: column {getattr(self, option)!r} is NaN{_cure(row, option, getattr(self, option))}"
            )
        return self._checked(value, option, where, row)

    def _checked(self, value: Any, option: str, where: str, row: Mapping[str, Any] | None = None) -> str:
        column = getattr(self, option)
        if not _is_text(value):
            cure = _cure(row or {}, option, column)
            raise ValueError(f"{where}: expected text in column {column!r}, got {type(value).__name__}{cure}")
        text = str(value)
        if not text.strip():
            raise ValueError(f"{where}: column {column!r} is empty{_cure(row or {}, option, column)}")
        if re.search("[\ud800-\udfff]", text):
            cure = _cure(row or {}, option, column)
            raise ValueError(f"{where}: column {column!r} holds a lone surrogate, which is not text{cure}")
        return text

    def _optional(self, row: Mapping[str, Any], option: str, where: str) -> str | None:
        """Returns the text of a column; None where it is missing, null, NaN or empty."""
        value = _found(row, getattr(self, option))
        missing = value is _ABSENT or value is None or value == "" or value != value
        return None if missing else self._text(row, option, where)


_ABSENT = object()


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _found(row: Mapping[str, Any], column: str) -> Any:
    """Returns the value of a column, through nested objects and lists; `_ABSENT` where there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for step in column.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, Sequence) and not isinstance(value, str) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return _ABSENT
    return value


def _content(message: Mapping[str, Any]) -> Any:
    """Returns the text of a message, which may come in parts; what is no text as it is."""
    content = message.get("content")
    if isinstance(content, list) and content and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(str(part["text"]) for part in content)
    return content


def _cure(row: Mapping[str, Any], option: str, nested: str = "") -> str:
    """Returns the key that takes another column, with one that the row has and that is usually meant."""
    known = _USUAL[option].split()
    if nested and isinstance(inner := _found(row, nested), Mapping):
        usual = sorted((f"{nested}.{key}" for key in inner), key=lambda path: path.split(".")[-1] not in known)
    else:
        usual = [name for name in known if name != nested and _found(row, name) is not _ABSENT]
    return f"; take another with columns: {{{option}: {usual[0] if usual else 'NAME'}}}"


def _stem(source: str) -> str:
    return Path(source.removesuffix(".gz")).stem
