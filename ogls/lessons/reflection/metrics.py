"""Reflections are measured by rates, and by their places against true errors."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ogls.lessons.prompts import PromptEncoder
from ogls.lessons.selection import token_span
from ogls.records import Problem, Reflection, Rollout, Span
from ogls.tasks.base import ErrorLocator


def report(
    found: Sequence[tuple[Problem, Rollout, Reflection | None]], encoder: PromptEncoder, truth: ErrorLocator | None
) -> dict[str, float]:
    """Returns rates of one step's reflections by name. A rate whose denominator is 0 is left out.

    ``reflections``             number of reflections
    ``reflection_parse_rate``   share of the cases that have a reflection
    ``reflection_leak_rate``    share of the reflections whose idea states the gold answer
    ``reflection_located_rate`` share of the wrong rollouts whose quote was found in the rollout
    ``reflection_start``        mean place where these quotes begin: 0 is the first token, 1 the end

    Where `truth` finds the error of a wrong rollout, there are also

    ``reflection_line_precision``   share of the located quotes that begin in the line of the error
    ``reflection_line_recall``      share of the wrong rollouts with such a quote
    ``reflection_token_precision``  share of the quoted tokens that belong to an error
    ``reflection_token_recall``     share of the tokens of errors that are quoted

    Args:
        found: problem, rollout and reflection of every case; None where no reflection was obtained
        encoder: encoder of the rollouts' text
        truth: locator of the true errors; None where there is none
    """
    reflections = [(problem, reflection) for problem, _, reflection in found if reflection is not None]
    wrong = [(problem, rollout, r.span if r else None) for problem, rollout, r in found if not rollout.correct]
    rates = {
        "reflection_parse_rate": _mean([reflection is not None for *_, reflection in found]),
        "reflection_leak_rate": _mean([answer_in(problem, r.idea) for problem, r in reflections]),
        "reflection_located_rate": _mean([span is not None for *_, span in wrong]),
    }
    starts, lines, quoted, errors, shared = [], [], 0, 0, 0
    for problem, rollout, span in wrong:
        text, offsets = encoder.decode_offsets(rollout.completion.token_ids)
        place = None if span is None else token_span(offsets, span)
        if place is not None:
            starts.append(place[0] / len(offsets))
        error = None if truth is None else truth.locate(problem, text)
        if error is None:
            continue
        lines.append(None if span is None else _line(text, span) == _line(text, error))
        quote, true = _tokens(place), _tokens(token_span(offsets, error))
        quoted, errors, shared = quoted + len(quote), errors + len(true), shared + len(quote & true)
    rates |= {
        "reflection_start": _mean(starts),
        "reflection_line_precision": _mean([right for right in lines if right is not None]),
        "reflection_line_recall": _mean([bool(right) for right in lines]),
        "reflection_token_precision": shared / quoted if quoted else None,
        "reflection_token_recall": shared / errors if errors else None,
    }
    known = {name: value for name, value in rates.items() if value is not None}
    return {"reflections": len(reflections), **known}


def answer_in(problem: Problem, text: str) -> bool:
    """Returns whether `text` states the gold answer as a word or number of its own.

    The letter of a multiple choice counts only where it is named as an option. A small number may be there for another
    reason, so this finds too many answers rather than too few.
    """
    return _stated(problem).search(text) is not None


def without_answer(problem: Problem, text: str) -> str:
    """Returns `text` with the gold answer blotted out wherever `answer_in` finds it."""
    return _stated(problem).sub("___", text)


def _stated(problem: Problem) -> re.Pattern[str]:
    answer = re.escape(problem.answer.strip())
    if problem.kind != "mcq":
        return re.compile(rf"(?<![\w.]){answer}(?!\w|\.\d)")
    named = rf"\b(?i:option|choice|answer)\W+(?:(?i:is)\W+)?{answer}\b"
    return re.compile(rf"{named}|\({answer}\)|(?<!\w){answer}(?=[:)])")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _line(text: str, span: Span) -> int:
    """Returns the number of the line in which a span begins; a span past the end belongs to the last line."""
    return text.count("\n", 0, span[0])


def _tokens(place: Span | None) -> set[int]:
    return set() if place is None else set(range(*place))
