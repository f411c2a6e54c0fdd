"""Problems of the lab (`experiments/lab.yaml`) with reference solutions in a style that its student cannot perform."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ogls.problems import ProblemSource
from ogls.records import Problem


@dataclass(frozen=True)
class TerseSolutions(ProblemSource):
    """The same problems, each with the last line of its solution alone: the answer without the work.

    Args:
        problems: where they come from.
    """

    problems: ProblemSource

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        problem = self.problems[index]
        if problem.solution is None:
            raise ValueError(f"problem {problem.id!r} has no solution to cut short")
        return replace(problem, solution=problem.solution.splitlines()[-1])
