from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ogls.policy.microbatch import budgeted, micro_batches
from ogls.records import Lesson


@given(st.lists(st.integers(1, 20)), st.integers(1, 30))
def test_runs_keep_the_order_and_the_budget(costs: list[int], budget: int):
    runs = list(budgeted(costs, lambda cost: cost, budget))
    assert [cost for run in runs for cost in run] == costs
    assert all(sum(run) <= budget or len(run) == 1 for run in runs)
    assert all(sum(run) + following[0] > budget for run, following in itertools.pairwise(runs))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), max_size=30), st.integers(1, 60))
def test_no_lesson_is_lost_and_those_of_one_prompt_stay_together(shapes: list[tuple[int, int]], budget: int):
    lessons = [
        Lesson(problem_id=str(i), prompt_ids=(prompt,) * prompt, token_ids=(7,) * tokens, token_weights=(1.0,) * tokens)
        for i, (prompt, tokens) in enumerate(shapes)
    ]
    out = [lesson for batch in micro_batches(lessons, budget) for lesson in batch]
    assert sorted(lesson.problem_id for lesson in out) == sorted(lesson.problem_id for lesson in lessons)
    prompts = [lesson.prompt_ids for lesson in out]
    assert all(prompts.index(p) + prompts.count(p) > i for i, p in enumerate(prompts))
