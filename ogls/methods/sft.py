"""SFT learns the reference solutions by their likelihood."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.privilege import Demonstration, Privilege
from ogls.loss.objective import Likelihood, Objective
from ogls.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class SFT(Method):
    """SFT learns the reference solutions s by their likelihood; it is the papers' baseline, and samples nothing.

    loss = -mean_t log student(s_t | x, s_<t)
    """

    privilege: Privilege = Demonstration()
    objective: Objective = Likelihood()
