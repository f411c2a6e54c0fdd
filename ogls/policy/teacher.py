"""Which weights teach: the student's start, its present self, its moving average, or something in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ogls.policy.policy import Policy

Weights = dict[str, Tensor]
"""Tensors by the names of the policy's trainable weights."""


@dataclass(frozen=True)
class Teacher(ABC):
    """A teacher has no trunk of its own: it lends its weights to the policy while the policy reads the views.

    `start` comes first and gives the weights that it keeps beside the student's, if any; whoever trains holds them and
    hands them to all other calls. `update` comes after each optimiser step.
    """

    @abstractmethod
    def start(self, policy: Policy) -> Weights:
        """Returns the weights that it keeps, made ready to teach `policy`."""

    @abstractmethod
    @contextmanager
    def applied_to(self, policy: Policy, kept: Weights) -> Iterator[None]:
        """Has `policy.hidden` give the teacher's states inside, without gradients."""

    def update(self, policy: Policy, kept: Weights) -> None:  # noqa: B027 - most teachers do not follow the student
        """Follows a step of the student."""

    def state_dict(self, kept: Weights) -> Weights:
        """Returns what a checkpoint needs to go on; most teachers need nothing."""
        return {}

    def load_state_dict(self, kept: Weights, state: Weights) -> None:
        """Takes over what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {len(state)} tensors of another teacher")


@dataclass(frozen=True)
class Frozen(Teacher):
    """The weights of the policy's folder teach: the adapter is off, or the folder's full weights are swapped in.

    With full weights a second copy of them is kept, in the dtype of the folder.
    """

    def start(self, policy: Policy) -> Weights:
        return policy.folder_weights() if policy.lora is None else {}

    @contextmanager
    def applied_to(self, policy: Policy, kept: Weights) -> Iterator[None]:
        lent = policy.swapped(kept) if policy.lora is None else policy.without_adapter()
        with torch.no_grad(), lent:
            yield


@dataclass(frozen=True)
class Live(Teacher):
    """The student's own present weights teach."""

    def start(self, policy: Policy) -> Weights:
        return {}

    @contextmanager
    def applied_to(self, policy: Policy, kept: Weights) -> Iterator[None]:
        with torch.no_grad():
            yield


@dataclass(frozen=True)
class EMA(Teacher):
    """A moving average of the student's weights teaches.

        mean <- decay * mean + (1 - decay) * student        for every trainable tensor, from the student's start

    With an adapter, A and B are averaged apart, so the effective delta is mean(B) mean(A), not the mean of B A. The two
    differ in second order of what changes within the averaging window.

    Args:
        decay: share of the mean that stays at each step; SDPO's rate of 0.05 is 0.95
    """

    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {self.decay}")

    def start(self, policy: Policy) -> Weights:
        return {name: p.detach().clone() for name, p in policy.trainable().items()}

    @contextmanager
    def applied_to(self, policy: Policy, kept: Weights) -> Iterator[None]:
        with torch.no_grad(), policy.swapped(kept):
            yield

    def update(self, policy: Policy, kept: Weights) -> None:
        for name, p in policy.trainable().items():
            kept[name] = torch.lerp(p.detach(), kept[name].to(p.device), self.decay)

    def state_dict(self, kept: Weights) -> Weights:
        return dict(kept)

    def load_state_dict(self, kept: Weights, state: Weights) -> None:
        if kept and state.keys() != kept.keys():
            raise ValueError(f"expected the averages of {len(kept)} trainable weights, got {len(state)} others")
        kept.update(state)


@dataclass(frozen=True)
class TrustRegion(Frozen):
    """The student's present logits teach, held near those of its start (SDPO, arXiv 2601.20802).

        z = lerp(z_start, z_student, share)        that is, p ∝ p_start^(1 - share) p_student^share

    The head is linear, so it is the states that are interpolated; every view is read twice. Where start and student
    agree, the teacher agrees with them to the last bit.

    Args:
        share: of the student; 0 is `Frozen`, 1 is `Live`
    """

    share: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")

    @contextmanager
    def applied_to(self, policy: Policy, kept: Weights) -> Iterator[None]:
        student, start_weights = policy.hidden, super().applied_to

        def between(*args: Any, **options: Any) -> Tensor:
            with start_weights(policy, kept):
                start = student(*args, **options).float()
            return torch.lerp(start, student(*args, **options).float(), self.share)

        policy.hidden = between  # the object's own, before the class's: what reads with `policy` reads with both
        try:
            with torch.no_grad():
                yield
        finally:
            del policy.hidden
