"""ROSD (arXiv 2605.28014) distils an idea from the first error on.

Its ablations and controls are here, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from ogls.lessons.privilege import Privilege, SuccessfulPeer
from ogls.lessons.reflection.exact import ExactReflector
from ogls.lessons.reflection.model import ModelReflector
from ogls.lessons.reflection.privilege import CorrectiveIdea, LocatedSolution
from ogls.lessons.reflection.reflector import Reflector
from ogls.lessons.selection import AllTokens, FromError, RandomPlace, ShiftedError, TokenSelection
from ogls.loss.divergence import JensenShannon
from ogls.loss.objective import Distillation, Objective
from ogls.loss.topk import TopK
from ogls.methods.base import Method
from ogls.policy.teacher import Frozen, Teacher


@dataclass(frozen=True, kw_only=True)
class ROSD(Method):
    """ROSD distils from where a rollout first goes wrong, with a teacher that reads the idea that it lacks.

    A reflector reads problem, right solution, wrong rollout and gold answer. It writes an exact quote of where the
    reasoning first goes wrong, and a corrective idea. The teacher reads the idea, and no solution:

        loss = mean over t >= quote of min(student(y_t) / sampler(y_t), 2) JSD_S(teacher(. | x, idea, y_<t), student)

    JSD_S is that of `SDPO`. Right rollouts of mixed groups get a reflection on why they are right, and are learned
    whole. A wrong rollout is not learned if the quote is not found in it. Teacher and reflector have the weights that
    training began with.
    """

    privilege: Privilege = CorrectiveIdea()
    reflector: Reflector | None = ModelReflector()
    teacher: Teacher = Frozen()
    objective: Objective = Distillation(JensenShannon(0.5), support=TopK(100), importance_cap=2.0)
    selection: TokenSelection = FromError()


@dataclass(frozen=True, kw_only=True)
class ROSDWithoutReflector(ROSD):
    """ROSD without its reflector is an ablation: the teacher reads a right rollout of the group; all tokens count."""

    privilege: Privilege = SuccessfulPeer()
    reflector: Reflector | None = None
    selection: TokenSelection = AllTokens()


@dataclass(frozen=True, kw_only=True)
class ROSDIdeaOnly(ROSD):
    """ROSD without its mask is an ablation: the teacher reads the idea, and all tokens count."""

    selection: TokenSelection = AllTokens()


@dataclass(frozen=True, kw_only=True)
class ROSDPlaceOnly(ROSD):
    """ROSD without its idea is an ablation: the teacher reads a right rollout; learning begins at the quote."""

    privilege: Privilege = LocatedSolution()


@dataclass(frozen=True, kw_only=True)
class ROSDExact(ROSD):
    """ROSD with exact reflections is a control: its reflector recomputes the problems, and is never wrong."""

    reflector: Reflector | None = ExactReflector()


@dataclass(frozen=True, kw_only=True)
class ROSDShifted(ROSD):
    """ROSD with a shifted place is a control: learning begins 8 tokens, about one line of a chain, after the quote."""

    selection: TokenSelection = ShiftedError(FromError(), tokens=8)


@dataclass(frozen=True, kw_only=True)
class ROSDShuffled(ROSD):
    """ROSD with shuffled ideas is a control: each rollout gets the idea for a rollout of another problem.

    The two rollouts are both right or both wrong.
    """

    reflector: Reflector | None = ModelReflector(shuffle_ideas=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reflector is None or not self.reflector.shuffle_ideas:
            raise ValueError(
                f"ROSDShuffled needs a reflector that exchanges ideas, got {self.reflector}: set "
                "method.reflector.shuffle_ideas to true"
            )


@dataclass(frozen=True, kw_only=True)
class ROSDRandomPlace(ROSD):
    """ROSD at a random place is a control: as many tokens as from the quote on count, in a row, somewhere else."""

    selection: TokenSelection = RandomPlace(FromError())
