"""Micro-batches cut a step into pieces that fit a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

from ogls.records import Lesson

T = TypeVar("T")


def budgeted(items: Iterable[T], cost: Callable[[T], int], budget: int) -> Iterator[list[T]]:
    """Yields runs of consecutive items whose costs add up to at most `budget`; an item above it stands alone."""
    run: list[T] = []
    spent = 0
    for item in items:
        if run and spent + cost(item) > budget:
            yield run
            run, spent = [], 0
        run.append(item)
        spent += cost(item)
    if run:
        yield run


def num_tokens(lesson: Lesson) -> int:
    """Returns the number of prompt and learned tokens of a lesson, which a budget counts."""
    return len(lesson.prompt_ids) + lesson.num_learned


def micro_batches(lessons: Sequence[Lesson], budget: int) -> Iterator[list[Lesson]]:
    """Yields all lessons, short ones first, in pieces of at most `budget` prompt and learned tokens.

    Lessons of one prompt stand side by side, so that they can share its pass. A lesson above the budget stands alone.
    """

    def length(lesson: Lesson) -> tuple[int, tuple[int, ...], int]:
        return len(lesson.prompt_ids), lesson.prompt_ids, lesson.num_learned

    ordered = sorted(lessons, key=length)
    by_prompt = [list(group) for _, group in groupby(ordered, key=lambda lesson: lesson.prompt_ids)]
    by_prompt.sort(key=lambda group: (max(lesson.num_learned for lesson in group), len(group[0].prompt_ids)))
    in_order = [lesson for group in by_prompt for lesson in group]
    yield from budgeted(in_order, num_tokens, budget)
