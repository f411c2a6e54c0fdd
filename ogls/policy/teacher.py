"""A teacher says who teaches: the student's start, present or average, or another model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ogls.policy.other import Other
from ogls.policy.policy import Policy

Weights = dict[str, Tensor]
"""Tensors by the names of the policy's trainable weights."""


@dataclass(frozen=True)
class Teacher(ABC):
    """A teacher lends weights to the policy while the policy reads the views, or has another model read them.

    A teacher is a choice without state. `start` returns the weights that it keeps beside the student's, if any, and
    `other` another model; the training module holds them and hands them to all other calls. `update` follows each
    optimiser step.
    """

    def other(self, student: Policy) -> Other | None:
        """Returns the model that reads the views in place of `student`, not loaded yet; None for the student's own."""
        return None

    @abstractmethod
    def start(self, policy: Policy) -> Weights:
        """Returns the weights that the teacher keeps beside those of `policy`, before its first update."""

    @abstractmethod
    @contextmanager
    def applied_to(self, policy: Policy, kept: Weights) -> Iterator[Policy]:
        """Yields `policy`, which gives the teacher's states, without gradients, while this context is entered.

        Args:
            policy: model that reads the views: the student, or the teacher's `other`
            kept: weights that the teacher keeps
        """

    def update(self, policy: Policy, kept: Weights) -> None:  # noqa: B027 - most teachers do not follow the student
        """Changes the kept weights after an update of the student; most teachers change nothing."""

    def kept_bytes(self, policy: Policy) -> int:
        """Returns the bytes per trainable weight that the teacher keeps beside those of `policy`."""
        return 0

    def state_dict(self, kept: Weights) -> Weights:
        """Returns the kept weights that a checkpoint has to hold; for most teachers there are none."""
        return {}

    def load_state_dict(self, kept: Weights, state: Weights) -> None:
        """Puts the weights of a checkpoint into `kept`.

        Raises:
            ValueError: the checkpoint is another teacher's.
        """
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {len(state)} tensors of another teacher")


@dataclass(frozen=True)
class Frozen(Teacher):
    """The weights that training began with teach.

    With an adapter, this is the policy without it. With full weights, a second copy of them is kept, beside the policy
    and in the dtype that it computes in.
    """

    def start(self, policy: Policy) -> Weights:
        return policy.folder_weights() if policy.lora is None else {}

    @contextmanager
    def applied_to(self, policy: Policy, kept: Weights) -> Iterator[Policy]:
        kept |= {name: weight.to(policy.device) for name, weight in kept.items()}  # stays there
        as_at_start = policy.swapped(kept) if policy.lora is None else policy.without_adapter()
        with torch.no_grad(), as_at_start:
            yield policy

    def kept_bytes(self, policy: Policy) -> int:
        return 0 if policy.lora else 2 if policy.dtype == "bfloat16" else 4


@dataclass(frozen=True)
class Live(Teacher):
    """The student's own present weights teach."""

    def start(self, policy: Policy) -> Weights:
        return {}

    @contextmanager
    def applied_to(self, policy: Policy, kept: Weights) -> Iterator[Policy]:
        with torch.no_grad():
            yield policy


@dataclass(frozen=True)
class EMA(Teacher):
    """A moving average of the student's weights teaches.

        mean <- decay * mean + (1 - decay) * student        for every trainable tensor, from the student's start

    With an adapter, A and B are averaged apart, so that the teacher's weights are W + scale mean(B) mean(A), not W +
    scale mean(B A). The two differ only in second order of what changes within the averaging window.

    Args:
        decay: share of the old mean in the new one; SDPO's published rate of 0.05 is a decay of 0.95
    """

    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {self.decay}")

    def start(self, policy: Policy) -> Weights:
        return {name: p.detach().clone() for name, p in policy.trainable().items()}

    @contextmanager
    def applied_to(self, policy: Policy, kept: Weights) -> Iterator[Policy]:
        with torch.no_grad(), policy.swapped(kept):
            yield policy

    def update(self, policy: Policy, kept: Weights) -> None:
        for name, p in policy.trainable().items():
            kept[name] = torch.lerp(p.detach(), kept[name].to(p.device), self.decay)

    def kept_bytes(self, policy: Policy) -> int:
        return 4

    def state_dict(self, kept: Weights) -> Weights:
        return dict(kept)

    def load_state_dict(self, kept: Weights, state: Weights) -> None:
        if kept and state.keys() != kept.keys():
            raise ValueError(f"expected the averages of {len(kept)} trainable weights, got {len(state)} others")
        kept.update(state)


@dataclass(frozen=True)
class TrustRegion(Frozen):
    """A mean of the student's logits, at its start and at present, teaches (SDPO, arXiv 2601.20802).

        z = (1 - share) z_start + share z_student        that is, p ∝ p_start^(1 - share) p_student^share

    The head is linear, so the mean is taken of states. Every view is read twice. Where start and student agree, the
    teacher agrees with them to the last bit.

    Args:
        share: share of the present student in the mean; 0 is `Frozen`, 1 is `Live`
    """

    share: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")

    def start(self, policy: Policy) -> Weights:
        if policy.train_embeddings:
            raise ValueError("TrustRegion takes a mean of states under one head: set policy.train_embeddings to false")
        return super().start(policy)

    @contextmanager
    def applied_to(self, policy: Policy, kept: Weights) -> Iterator[Policy]:
        student, start_weights = policy.hidden, super().applied_to

        def between(*args: Any, **options: Any) -> Tensor:
            with start_weights(policy, kept):
                start = student(*args, **options).float()
            return torch.lerp(start, student(*args, **options).float(), self.share)

        policy.hidden = between  # an attribute of the object hides the method of its class
        try:
            with torch.no_grad():
                yield policy
        finally:
            del policy.hidden


@dataclass(frozen=True)
class OtherModel(Live):
    """Another model teaches: a larger one, or one that has learned more (on-policy distillation).

    It has weights and an output head of its own, is not trained, and reads the same token ids as the student. So it
    needs the student's tokenizer; a chat template of its own is not used.

    Args:
        model: name of the embedded model, folder, or Hub id, as in `policy.model`
        adapter: folder of a peft adapter that is merged into the model; null merges none
    """

    model: str
    adapter: str | None = None

    def other(self, student: Policy) -> Other:
        return Other(student, self.model, self.adapter)
