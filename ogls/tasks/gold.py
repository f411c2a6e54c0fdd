"""Before training: does every gold answer verify against itself?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ogls.records import Problem

if TYPE_CHECKING:
    from ogls.tasks.grading import GradingPool

_NAMED = 20


def unverifiable_gold(problems: Iterable[Problem], pool: GradingPool) -> list[str]:
    """Ids of the problems whose gold answer, stated as a completion should state it, is not graded correct.

    ValueError for a kind of problem that has no verifier and for a gold answer that its verifier cannot read at all.
    """
    pairs = [(problem, pool.verifier.canonical(problem)) for problem in problems]
    verdicts = pool.grade(pairs)
    return [problem.id for (problem, _), verdict in zip(pairs, verdicts, strict=True) if not verdict.correct]


def verify_gold(problems: Iterable[Problem], pool: GradingPool) -> None:
    """ValueError that names the problems whose gold answer does not verify: no completion could ever be right."""
    failed = unverifiable_gold(problems, pool)
    if failed:
        named = ", ".join(failed[:_NAMED]) + (f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else "")
        raise ValueError(f"expected every gold answer to verify against itself, {len(failed)} did not: {named}")
