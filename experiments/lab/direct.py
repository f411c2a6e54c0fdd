"""Problems whose prompts end a thought before it begins, whatever the options of the chat template say."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ogls.records import Problem
from ogls.tasks.base import ProblemSource


@dataclass(frozen=True)
class Direct(ProblemSource):
    """This source asks another one's problems so that the third lab's student answers without thinking.

    With it one run is judged in both modes, each as an evaluation set.

    Args:
        problems: source of the problems
    """

    problems: ProblemSource

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        problem = self.problems[index]
        return replace(problem, text=f"{problem.text}<think></think>")
