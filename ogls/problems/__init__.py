"""Where problems come from."""

from ogls.problems.base import ProblemSource, drawn
from ogls.problems.reasoning_gym import ReasoningGym
from ogls.problems.tables import Columns, HubProblems, JsonlProblems

__all__ = ["Columns", "HubProblems", "JsonlProblems", "ProblemSource", "ReasoningGym", "drawn"]
