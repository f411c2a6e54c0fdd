"""SFT: likelihood of the reference solutions, the papers' other baseline."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.privilege import Demonstration, Privilege
from ogls.loss.objective import Likelihood, Objective
from ogls.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class SFT(Method):
    """SFT learns the reference solutions s: loss = -mean_t log student(s_t | x, s_<t). Nothing is sampled."""

    privilege: Privilege = Demonstration()
    objective: Objective = Likelihood()
