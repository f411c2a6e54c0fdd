"""Cutting one optimiser step into pieces that fit: by a budget of tokens, longest kept with longest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

from ogls.records import Lesson

T = TypeVar("T")


def budgeted(items: Iterable[T], cost: Callable[[T], int], budget: int) -> Iterator[list[T]]:
    """Runs of consecutive items whose costs stay within `budget`; an item above it stands alone."""
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


def micro_batches(lessons: Sequence[Lesson], budget: int) -> Iterator[list[Lesson]]:
    """Lessons by length, those of one prompt side by side so that they share it."""

    def length(lesson: Lesson) -> tuple[int, tuple[int, ...], int]:
        return len(lesson.prompt_ids), lesson.prompt_ids, lesson.num_learned

    ordered = sorted(lessons, key=length)
    by_prompt = [list(group) for _, group in groupby(ordered, key=lambda lesson: lesson.prompt_ids)]
    by_prompt.sort(key=lambda group: (max(lesson.num_learned for lesson in group), len(group[0].prompt_ids)))
    in_order = [lesson for group in by_prompt for lesson in group]
    yield from budgeted(in_order, lambda lesson: len(lesson.prompt_ids) + lesson.num_learned, budget)
