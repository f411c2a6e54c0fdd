"""What reflections are worth: rates of one step, and their places against the true ones."""

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
    """Rates of the reflections asked for. One whose denominator is 0 is left out.

    ``reflections``             how many there are
    ``reflection_parse_rate``   of all asked for
    ``reflection_leak_rate``    of these, ideas that state the gold answer
    ``reflection_located_rate`` of the wrong rollouts asked about, those with a place in the rollout
    ``reflection_start``        where these places begin: 0 the first token, 1 the end

    and, where `truth` finds the error of a wrong rollout,

    ``reflection_line_precision``   of the located ones: the quote begins in the line where the error is
    ``reflection_line_recall``      the same, of all wrong rollouts asked about
    ``reflection_token_precision``  tokens of the quotes that belong to the error, of all tokens quoted
    ``reflection_token_recall``     of all tokens of the errors
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
    """Whether `text` states the gold answer: as a word or number of its own, a letter of a choice only as an option.

    A small number may be there for another reason, so this sees too much rather than too little.
    """
    return _stated(problem).search(text) is not None


def without_answer(problem: Problem, text: str) -> str:
    """`text` with the gold answer blotted out wherever `answer_in` sees it."""
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
    """Number of the line in which a span begins; past the end, of the last one."""
    return text.count("\n", 0, span[0])


def _tokens(place: Span | None) -> set[int]:
    return set() if place is None else set(range(*place))
