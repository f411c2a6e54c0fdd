"""A method is a set of independent choices, checked against each other.

The check takes place once, when the method is made.
"""

from __future__ import annotations

from abc import ABC
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from ogls.lessons.advantage import Advantage
from ogls.lessons.privilege import Privilege, Unprivileged
from ogls.lessons.prompts import Wording
from ogls.lessons.reflection.reflector import Reflector
from ogls.lessons.selection import AllTokens, TokenSelection
from ogls.loss.objective import Distillation, Objective, Target, Term
from ogls.loss.steering import Steering, Unsteered
from ogls.policy.teacher import Frozen, Teacher
from ogls.records import Need, Role, RolloutGroup, Sampling


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method is a set of choices; a subclass is a paper, and its defaults are what the paper chose.

    Choices that do not fit together are refused here, before anything is loaded. The `name` follows from the choices,
    so it cannot be false.

    Args:
        privilege: choice of the rollouts that are learned from, and of what the teacher reads about each
        reflector: source of reflections, which say where a rollout first goes wrong and which idea it lacks; null makes
            none
        teacher: choice of the weights that read the teacher's views
        steering: rule that makes a target of the teacher's views
        objective: loss that is minimised
        selection: choice of the tokens of a rollout that count
        advantage: value of a rollout against its group, for objectives that reinforce; null for all others
        temperature: divisor of the logits from which training rollouts are drawn
        top_p: probability mass of the likeliest tokens from which training rollouts are drawn; 1 cuts nothing
        top_k: number of the likeliest tokens from which training rollouts are drawn; 0 cuts nothing

    Raises:
        ValueError: two choices do not fit together; the message names them and what one asks of the other.
    """

    privilege: Privilege = Unprivileged()
    reflector: Reflector | None = None
    teacher: Teacher = Frozen()
    steering: Steering = Unsteered()
    objective: Objective = Distillation()
    selection: TokenSelection = AllTokens()
    advantage: Advantage | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        self._check_views()
        self._check_needs()

    @property
    def name(self) -> str:
        """Returns the class and every choice that is not its default, such as ``OPSD[selection=ErrorSpan]``."""
        uses = Counter(_field_names(self))
        changed = ", ".join(
            f"{path[-1] if uses[path[-1]] == 1 else '.'.join(path)}={_shown(value)}"
            for path, value in _changes(self, type(self))
        )
        return f"{type(self).__name__}[{changed}]" if changed else type(self).__name__

    @property
    def views(self) -> Mapping[Role, Wording]:
        """Returns the roles of the teacher's privileged views with the words around each; empty without a teacher."""
        return self.privilege.views if "rollouts" in self.privilege.needs else {}

    @property
    def targets(self) -> tuple[Target, ...]:
        """Returns all targets that the terms of the objective learn towards, each once."""
        found = (term.target(self.steering) for _, term in self.objective.terms)
        return tuple(dict.fromkeys(target for target in found if target is not None))

    @property
    def needs(self) -> frozenset[Need]:
        """Returns what the run has to provide, which other choices of the method do not."""
        asked = frozenset().union(*(needs for _, needs in self._asking()))
        given = {"advantages", "logprobs", "reflections"} | ({"error"} if self.reflector is not None else set())
        return asked - given

    @property
    def uncorrected(self) -> tuple[str, ...]:
        """Returns the names of the terms that cannot learn from stale rollouts.

        These are all terms without an importance ratio, except for those that only hold the student near its start.
        """
        return tuple(
            type(term).__name__
            for _, term in self.objective.terms
            if "logprobs" not in term.needs and not self._is_towards_start(term)
        )

    def sampling(self, max_tokens: int) -> Sampling:
        """Returns the rule by which training rollouts of at most `max_tokens` tokens are drawn."""
        return Sampling(max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    def teaches(self, group: RolloutGroup) -> bool:
        """Returns whether a group of rollouts gives a lesson; with a reflector, whether its outcomes differ."""
        if self.reflector is not None:
            return group.mixed
        reinforced = self.advantage is not None and any(self.advantage.of(group))
        return reinforced or next(self.privilege.drafts(group), None) is not None

    def _asking(self) -> Iterator[tuple[str, frozenset[Need]]]:
        """Yields the name of every choice that can ask for something, with what it asks for."""
        choices = (self.privilege, self.selection, self.reflector, *(term for _, term in self.objective.terms))
        yield from ((type(choice).__name__, choice.needs) for choice in choices if choice is not None)

    def _is_towards_start(self, term: Term) -> bool:
        target = term.target(self.steering)
        return target is not None and target.weights == "start"

    def _check_views(self) -> None:
        reader, roles = type(self.privilege).__name__, sorted(self.views)
        taught = [target for target in self.targets if target.weights == "teacher"]
        learner = type(self.objective).__name__
        if (roles or self.privilege.plain) and not taught:
            raise ValueError(
                f"{reader} gives views of role {roles or ['plain']}, but {learner} has no teacher: change one of them"
            )
        if taught and not roles and not self.privilege.plain:
            raise ValueError(f"{learner} learns from a teacher's views, but {reader} gives none: change one of them")
        for target in taught:
            try:
                target.steering.coefficients(["plain", *roles])
            except ValueError as error:
                names = f"{type(target.steering).__name__} and {reader}"
                raise ValueError(f"steering and privilege do not fit, {names}: {error}") from error

    def _check_needs(self) -> None:
        drawn = self.sampling(max_tokens=1)
        for name, needs in self._asking():
            if "reflections" in needs and self.reflector is None:
                raise ValueError(f"{name} reads reflections: set method.reflector")
            if "advantages" in needs and self.advantage is None:
                raise ValueError(f"{name} needs advantages: set method.advantage")
        if self.advantage is not None and not any("advantages" in needs for _, needs in self._asking()):
            names = f"{type(self.objective).__name__} makes no use of {type(self.advantage).__name__}"
            raise ValueError(f"{names}: set method.advantage to null")
        for _, term in self.objective.terms:
            if "logprobs" in term.needs and not drawn.is_softmax_at(term.temperature):
                raise ValueError(
                    f"{type(term).__name__} takes ratios to the sampler's probabilities at temperature "
                    f"{term.temperature}: expected method.temperature to be that, top_p 1 and top_k 0, got "
                    f"{self.temperature}, {self.top_p} and {self.top_k}"
                )


def _field_names(value: Any) -> Iterator[str]:
    """Yields the names of all fields of a dataclass and of the dataclasses in it; a name can come several times."""
    for field in fields(value):
        if field.init:
            yield field.name
            own = getattr(value, field.name)
            yield from _field_names(own) if is_dataclass(own) else ()


def _changes(value: Any, default: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the path and value of every field in which `value` differs from `default`, an object or a class."""
    if value == default:
        return
    kind = default if isinstance(default, type) else type(default)
    if is_dataclass(value) and type(value) is kind:
        for field in fields(value):
            if field.init:
                own = _default(field) if isinstance(default, type) else getattr(default, field.name)
                yield from _changes(getattr(value, field.name), own, (*path, field.name))
    else:
        yield path, value


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _shown(value: Any) -> str:
    """Returns a value as a name shows it, without defaults: ``ErrorSpan``, ``FirstTokens(count=256)``, ``0.5``."""
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_shown, value))})"
    if is_dataclass(value):
        inner = ", ".join(f"{'.'.join(path)}={_shown(changed)}" for path, changed in _changes(value, type(value)))
        return f"{type(value).__name__}({inner})" if inner else type(value).__name__
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value is None or isinstance(value, int | str) else type(value).__name__
