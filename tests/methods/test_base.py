"""The name of a method is its choices; what does not fit together is refused; what the run has to provide is known."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from lab.demonstrations import WorkedAttempts

import ogls.methods
from ogls.lessons.advantage import GroupRelative
from ogls.lessons.privilege import (
    Demonstration,
    PeerOutcomes,
    ReferenceSolution,
    Several,
    ShortSuccesses,
    Unprivileged,
)
from ogls.lessons.reflection.exact import ExactReflector
from ogls.lessons.reflection.model import ModelReflector
from ogls.lessons.reflection.privilege import CorrectiveIdea
from ogls.lessons.selection import (
    AllTokens,
    ErrorSpan,
    FirstTokens,
    FromError,
    ShiftedError,
    TokenSelection,
    UpToError,
)
from ogls.loss.divergence import ForwardKL, JensenShannon
from ogls.loss.objective import Distillation, Likelihood, Mixture, ReferenceKL, Target
from ogls.loss.policy_gradient import GRPO as GRPOTerm
from ogls.loss.policy_gradient import Scaled
from ogls.loss.steering import OutcomeContrast, OutcomeSteering, Plain, PositiveMean, PositiveOnly, Steering, Unsteered
from ogls.loss.topk import TopK
from ogls.methods import (
    GRPO,
    GRPO_OGLS_SD,
    OGLS_SD,
    OPSD,
    RLCSD,
    ROSD,
    SDPO,
    SFT,
    SRPO,
    BudgetedOGLS_SD,
    GRPOWithKL,
    Method,
    OGLS_SD_v2,
    ROSDExact,
    ROSDShifted,
    ROSDWithoutReflector,
)
from ogls.policy.teacher import EMA, Frozen, Live
from ogls.records import Need, Rollout, Sampling, Span

PRESETS = [name for name in ogls.methods.__all__ if name != "Method"]
OF_OPSD: dict[str, Any] = {"temperature": 1.1, "clip": 0.05, "one_sided": True}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_together_and_has_the_name_of_its_class(name: str) -> None:
    preset = getattr(ogls.methods, name)
    assert preset().name == name == preset.__name__
    assert preset() == preset()
    assert isinstance(preset(), Method)


@dataclass(frozen=True, kw_only=True)
class OfMyOwn(OPSD):
    """A method of no paper; what the class has is its default."""

    top_k: int = 5


class Unnamed(TokenSelection):
    """A choice that is no dataclass."""

    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        return ()


NAMES: list[tuple[Method, str]] = [
    (OPSD(), "OPSD"),
    (OPSD(selection=FirstTokens(1024), temperature=1.1), "OPSD"),
    (OPSD(selection=ErrorSpan()), "OPSD[selection=ErrorSpan]"),
    (OPSD(selection=ErrorSpan(after=2)), "OPSD[selection=ErrorSpan(after=2)]"),
    (OPSD(selection=FirstTokens(256)), "OPSD[count=256]"),
    (OPSD(privilege=ReferenceSolution("wrong"), top_k=0), "OPSD[rollouts=wrong, top_k=0]"),
    (OPSD(selection=Unnamed()), "OPSD[selection=Unnamed]"),
    (
        OGLS_SD(selection=ShiftedError(UpToError(), -3)),
        "OGLS_SD[selection=ShiftedError(selection=UpToError, tokens=-3)]",
    ),
    (OGLS_SD(objective=Distillation(ForwardKL())), "OGLS_SD[clip=None]"),
    (OGLS_SD(steering=OutcomeSteering(0.5, 100)), "OGLS_SD[alpha=0.5]"),
    (OGLS_SD(steering=OutcomeSteering(2.0)), "OGLS_SD[alpha=2, ramp_steps=0]"),
    (ROSD(reflector=ModelReflector(right_rollouts=False)), "ROSD[right_rollouts=False]"),
    (ROSD(reflector=ExactReflector()), "ROSD[reflector=ExactReflector]"),
    (ROSDExact(), "ROSDExact"),
    (OfMyOwn(), "OfMyOwn"),
    (OfMyOwn(top_p=0.5), "OfMyOwn[top_p=0.5]"),
    (Method(privilege=ReferenceSolution()), "Method[privilege=ReferenceSolution]"),
    # within a choice within a choice
    (SDPO(objective=Distillation(JensenShannon(0.3), TopK(100), importance_cap=2.0)), "SDPO[beta=0.3]"),
    (SDPO(objective=Distillation(JensenShannon(), TopK(20, "union"), importance_cap=2.0)), "SDPO[k=20, of=union]"),
    (OPSD(objective=Distillation(JensenShannon(0.3), **OF_OPSD)), "OPSD[divergence=JensenShannon(beta=0.3)]"),
    # teachers are values
    (SDPO(teacher=EMA(0.95)), "SDPO"),
    (SDPO(teacher=EMA(0.9)), "SDPO[decay=0.9]"),
    (SDPO(teacher=Live()), "SDPO[teacher=Live]"),
    # names that several fields have
    (OPSD(temperature=1.0), "OPSD[temperature=1]"),
    (OPSD(objective=Distillation(**(OF_OPSD | {"temperature": 1.0}))), "OPSD[objective.temperature=1]"),
    (
        OPSD(objective=Distillation(**(OF_OPSD | {"temperature": 1.0})), temperature=1.0),
        "OPSD[objective.temperature=1, temperature=1]",
    ),
    (
        ROSD(temperature=1.0, reflector=ModelReflector(weights="frozen", temperature=1.0)),
        "ROSD[reflector.temperature=1]",
    ),
    (ROSDShifted(selection=ErrorSpan()), "ROSDShifted[selection=ErrorSpan]"),
    (ROSDShifted(selection=ShiftedError(ErrorSpan(), 8)), "ROSDShifted[selection.selection=ErrorSpan]"),
    (OGLS_SD(steering=PositiveMean()), "OGLS_SD[steering=PositiveMean]"),
    (
        OGLS_SD(objective=Distillation(clip=0.05, steering=PositiveMean())),
        "OGLS_SD[objective.steering=PositiveMean]",
    ),
    # lists
    (
        OGLS_SD_v2(privilege=Several([PeerOutcomes(max_peers=1), ShortSuccesses()])),
        "OGLS_SD_v2[privileges=(PeerOutcomes(max_peers=1), ShortSuccesses)]",
    ),
    (GRPOWithKL(objective=Mixture([GRPOTerm(), ReferenceKL()], [1.0, 0.1])), "GRPOWithKL[factors=(1, 0.1)]"),
    (
        GRPO(objective=Mixture([GRPOTerm(per="token"), ReferenceKL()])),
        "GRPO[objective=Mixture(objectives=(GRPO(per=token), ReferenceKL))]",
    ),
]


@pytest.mark.parametrize(("method", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_name_is_the_class_and_what_is_not_its_default(method: Method, name: str) -> None:
    assert method.name == name


def test_two_methods_have_one_name_only_if_they_are_the_same() -> None:
    methods = [method for method, _ in NAMES if not isinstance(method.selection, Unnamed)]
    for one, other in itertools.combinations(methods, 2):
        assert (one.name == other.name) == (one == other), (one.name, other.name)


def test_two_teachers_of_one_decay_are_the_same() -> None:
    assert EMA(0.95) == EMA(0.95)
    assert hash(EMA(0.95)) == hash(EMA(0.95))
    assert EMA(0.95) != EMA(0.9)
    assert EMA(1.0) != Frozen()
    assert SDPO(teacher=EMA(0.95)) == SDPO()


REFUSED: list[tuple[type[Method], dict[str, Any], str]] = [
    (
        GRPO,
        {"privilege": ReferenceSolution()},
        "ReferenceSolution gives views of role ['success'], but GRPO has no teacher: change one of them",
    ),
    (
        SFT,
        {"privilege": PeerOutcomes()},
        "PeerOutcomes gives views of role ['failure', 'success'], but Likelihood has no teacher: change one of them",
    ),
    (
        Method,
        {"privilege": ReferenceSolution(), "objective": ReferenceKL()},
        "ReferenceSolution gives views of role ['success'], but ReferenceKL has no teacher: change one of them",
    ),
    (
        GRPOWithKL,
        {"privilege": Several([ReferenceSolution(), ShortSuccesses()])},
        "Several gives views of role ['success'], but Mixture has no teacher: change one of them",
    ),
    (
        OPSD,
        {"privilege": Unprivileged()},
        "Distillation learns from a teacher's views, but Unprivileged gives none: change one of them",
    ),
    (
        OPSD,
        {"privilege": Demonstration()},
        "Distillation learns from a teacher's views, but Demonstration gives none: change one of them",
    ),
    (
        RLCSD,
        {"privilege": Unprivileged()},
        "GRPO learns from a teacher's views, but Unprivileged gives none: change one of them",
    ),
    (
        OPSD,
        {"steering": OutcomeSteering()},
        "steering and privilege do not fit, OutcomeSteering and ReferenceSolution: "
        "the steering needs a view of role 'failure', got roles ['plain', 'success']",
    ),
    (
        ROSD,
        {"steering": PositiveOnly()},
        "steering and privilege do not fit, PositiveOnly and CorrectiveIdea: "
        "the steering needs a view of role 'success', got roles ['plain', 'idea']",
    ),
    (
        OPSD,
        {"objective": Mixture([Distillation(), Distillation(steering=OutcomeContrast())])},
        "steering and privilege do not fit, OutcomeContrast and ReferenceSolution: "
        "the steering needs a view of role 'failure', got roles ['plain', 'success']",
    ),
    (ROSD, {"reflector": None}, "CorrectiveIdea reads reflections: set method.reflector"),
    (OPSD, {"privilege": CorrectiveIdea()}, "CorrectiveIdea reads reflections: set method.reflector"),
    (GRPO, {"advantage": None}, "GRPO needs advantages: set method.advantage"),
    (SRPO, {"advantage": None}, "GRPO needs advantages: set method.advantage"),
    (
        OPSD,
        {"advantage": GroupRelative()},
        "Distillation makes no use of GroupRelative: set method.advantage to null",
    ),
    (
        OGLS_SD_v2,
        {"advantage": GroupRelative(routed=True)},
        "Mixture makes no use of GroupRelative: set method.advantage to null",
    ),
    (
        SDPO,
        {"temperature": 1.1},
        "Distillation takes ratios to the sampler's probabilities at temperature 1.0: expected method.temperature to "
        "be that, top_p 1 and top_k 0, got 1.1, 1.0 and 0",
    ),
    (
        GRPO,
        {"top_p": 0.95},
        "GRPO takes ratios to the sampler's probabilities at temperature 1.0: expected method.temperature to be that, "
        "top_p 1 and top_k 0, got 1.0, 0.95 and 0",
    ),
    (
        GRPOWithKL,
        {"top_k": 20},
        "GRPO takes ratios to the sampler's probabilities at temperature 1.0: expected method.temperature to be that, "
        "top_p 1 and top_k 0, got 1.0, 1.0 and 20",
    ),
    (
        GRPO,
        {"objective": GRPOTerm(temperature=1.2)},
        "GRPO takes ratios to the sampler's probabilities at temperature 1.2: expected method.temperature to be that, "
        "top_p 1 and top_k 0, got 1.0, 1.0 and 0",
    ),
    (OPSD, {"temperature": -0.5}, "temperature must be 0 or in [0.01, 100], got -0.5"),
    (OPSD, {"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
    (OPSD, {"top_k": -1}, "top_k must be 0 (off) or more, got -1"),
]


@pytest.mark.parametrize(("preset", "changes", "message"), REFUSED)
def test_choices_that_do_not_fit_are_refused(preset: type[Method], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        preset(**changes)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        (GRPO, {"objective": GRPOTerm(temperature=1.2), "temperature": 1.2}),
        (SDPO, {"objective": Distillation(), "temperature": 0.7, "top_p": 0.9, "top_k": 5}),
        (ROSD, {"privilege": PeerOutcomes(), "steering": OutcomeSteering()}),
        (OPSD, {"steering": Plain()}),
        (OPSD, {"objective": Mixture([Distillation(), ReferenceKL()], [1.0, 0.1])}),
        (OGLS_SD, {"objective": Mixture([Distillation(), Distillation(steering=PositiveMean())])}),
        (GRPO, {"objective": Mixture([GRPOTerm(), Likelihood()]), "privilege": Demonstration()}),
    ],
)
def test_choices_that_fit_are_not(preset: type[Method], changes: dict[str, Any]) -> None:
    assert replace(preset(), **changes) == preset(**changes)


SAMPLED: set[Need] = {"rollouts"}
COMPARED: set[Need] = {"rollouts", "peers"}


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        (SFT(), {"demonstrations", "solutions"}),
        (OPSD(), SAMPLED | {"solutions"}),
        (OPSD(selection=ErrorSpan()), SAMPLED | {"solutions", "error"}),
        (OPSD(selection=ErrorSpan(), reflector=ExactReflector()), SAMPLED | {"solutions", "ideas"}),
        (SDPO(), COMPARED),
        (OGLS_SD(), COMPARED),
        (OGLS_SD_v2(selection=UpToError()), COMPARED | {"error"}),
        (GRPO(), COMPARED),
        (GRPOWithKL(), COMPARED),
        (SRPO(), COMPARED),
        (RLCSD(), COMPARED),
        (ROSD(), COMPARED | {"replies", "start"}),
        (ROSD(reflector=ModelReflector(weights="student")), COMPARED | {"replies"}),
        (ROSDExact(), COMPARED | {"ideas"}),
        (ROSDWithoutReflector(selection=FromError()), COMPARED | {"error"}),
        (
            Method(privilege=Demonstration(), objective=Mixture([Likelihood(), ReferenceKL()])),
            SAMPLED | {"demonstrations", "solutions"},
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else None,
)
def test_what_is_left_for_the_run_to_provide(method: Method, needs: set[Need]) -> None:
    assert method.needs == needs


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        (SFT(), ["Likelihood"]),
        (OPSD(), ["Distillation"]),
        (SDPO(), []),
        (OGLS_SD_v2(), ["Distillation", "Likelihood"]),
        (GRPO(), []),
        (GRPOWithKL(), []),
        (SRPO(), []),
        (GRPO_OGLS_SD(), ["Distillation"]),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else None,
)
def test_terms_without_an_importance_ratio_are_named(method: Method, terms: list[str]) -> None:
    assert list(method.uncorrected) == terms


def taught(*steerings: Steering) -> list[Target]:
    return [Target("teacher", steering) for steering in steerings]


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        (SFT(), []),
        (GRPO(), []),
        (OPSD(), taught(Unsteered())),
        (OGLS_SD(), taught(OutcomeSteering(3.0, 100))),
        (RLCSD(), taught(OutcomeContrast())),
        (BudgetedOGLS_SD(), taught(BudgetedOGLS_SD().steering)),
        (GRPOWithKL(), [Target("start", Plain())]),
        (OGLS_SD_v2(), taught(OutcomeSteering(3.0, 100))),
        (
            OPSD(objective=Mixture([Distillation(), ReferenceKL(), Distillation(steering=Plain())])),
            [*taught(Unsteered()), Target("start", Plain()), *taught(Plain())],
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else None,
)
def test_what_the_terms_learn_towards(method: Method, targets: Sequence[Target]) -> None:
    assert list(method.targets) == list(targets)


def test_a_target_of_several_terms_is_one() -> None:
    shaped, own = GRPOTerm(shaping=Scaled()), Distillation(steering=PositiveMean())
    objective = Mixture([shaped, Distillation(), own, Distillation(JensenShannon(), steering=PositiveMean())])
    method = RLCSD(objective=objective, steering=OutcomeSteering(2.0))
    assert list(method.targets) == taught(OutcomeSteering(2.0), PositiveMean())


def test_views_are_the_privileges_where_somebody_is_taught() -> None:
    assert OGLS_SD().views == PeerOutcomes.views
    assert OGLS_SD_v2().views == PeerOutcomes.views
    assert GRPO().views == SFT().views == {}
    assert WorkedAttempts.views  # what it shows is shown to the student
    assert SFT(privilege=WorkedAttempts()).views == {}


def test_training_rollouts_are_drawn_as_the_method_says() -> None:
    assert OPSD().sampling(7) == Sampling(max_tokens=7, temperature=1.1, top_p=0.95, top_k=20)
    assert GRPO(selection=AllTokens()).sampling(9) == Sampling(max_tokens=9)
