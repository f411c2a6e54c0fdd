"""Every gold answer has to verify against itself before training begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ogls.records import Problem

if TYPE_CHECKING:
    from ogls.tasks.grading import GradingPool

_NAMED = 20


def unverifiable_gold(problems: Iterable[Problem], pool: GradingPool) -> list[str]:
    """Returns the ids of the problems whose gold answer, stated as a completion should state it, is not graded right.

    Raises:
        ValueError: a kind of problem has no verifier, or a gold answer cannot be read by its verifier.
    """
    pairs = [(problem, pool.verifier.canonical(problem)) for problem in problems]
    verdicts = pool.grade(pairs)
    return [problem.id for (problem, _), verdict in zip(pairs, verdicts, strict=True) if not verdict.correct]


def verify_gold(problems: Iterable[Problem], pool: GradingPool) -> None:
    """Raises ValueError where gold answers do not verify, since no completion could ever be right; it names them."""
    failed = unverifiable_gold(problems, pool)
    if failed:
        named = ", ".join(failed[:_NAMED]) + (f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else "")
        raise ValueError(f"expected every gold answer to verify against itself, {len(failed)} did not: {named}")
