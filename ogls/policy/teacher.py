"""Which weights teach: the student's start, its present self, its moving average, or something in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ogls.policy.policy import Policy


class Teacher(ABC):
    """A teacher has no trunk of its own. It lends its weights to the policy while the policy reads the views.

    `start(policy)` comes first, `update(policy)` after each optimiser step; a checkpoint's states are plain tensors.
    """

    @abstractmethod
    def start(self, policy: Policy) -> None:
        """Make ready to teach `policy`."""

    @abstractmethod
    @contextmanager
    def weights(self, policy: Policy) -> Iterator[None]:
        """Inside, `policy.hidden` gives the teacher's states, without gradients."""

    def update(self, policy: Policy) -> None:  # noqa: B027 - most teachers do not follow the student
        """Follow a step of the student."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {len(state)} tensors of another teacher")


class Frozen(Teacher):
    """The weights of the policy's folder: the adapter off, or, with full weights, the folder's weights swapped in.

    With full weights a second copy of them is kept, in the dtype of the folder.
    """

    def __init__(self) -> None:
        self._folder_weights: dict[str, Tensor] = {}

    def start(self, policy: Policy) -> None:
        self._folder_weights = policy.folder_weights() if policy.lora is None else {}

    @contextmanager
    def weights(self, policy: Policy) -> Iterator[None]:
        lent = policy.swapped(self._folder_weights) if policy.lora is None else policy.without_adapter()
        with torch.no_grad(), lent:
            yield


class Live(Teacher):
    """The student's own present weights."""

    def start(self, policy: Policy) -> None:
        pass

    @contextmanager
    def weights(self, policy: Policy) -> Iterator[None]:
        with torch.no_grad():
            yield


class EMA(Teacher):
    """mean <- decay * mean + (1 - decay) * student, for every trainable tensor, from the student's start.

    With an adapter, A and B are averaged apart, so the effective delta is mean(B) mean(A), not the mean of B A. The two
    differ in second order of what changes within the averaging window. SDPO's rate of 0.05 is `decay` 0.95.
    """

    def __init__(self, decay: float = 0.95) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.decay = decay
        self._mean: dict[str, Tensor] = {}

    def start(self, policy: Policy) -> None:
        self._mean = {name: p.detach().clone() for name, p in policy.trainable().items()}

    @contextmanager
    def weights(self, policy: Policy) -> Iterator[None]:
        with torch.no_grad(), policy.swapped(self._mean):
            yield

    def update(self, policy: Policy) -> None:
        for name, p in policy.trainable().items():
            self._mean[name] = torch.lerp(p.detach(), self._mean[name].to(p.device), self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._mean)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self._mean and state.keys() != self._mean.keys():
            raise ValueError(f"expected the averages of {len(self._mean)} trainable weights, got {len(state)} others")
        self._mean = dict(state)


class TrustRegion(Teacher):
    """SDPO's trust-region teacher (arXiv 2601.20802): the student's present logits, held near those of its start.

        z = lerp(z_start, z_student, share)        that is, p ∝ p_start^(1 - share) p_student^share

    The head is linear, so it is the states that are interpolated; every view is read twice. Where start and student
    agree, the teacher agrees with them to the last bit. `share` 0 is `Frozen`, 1 is `Live`.
    """

    def __init__(self, share: float = 0.05) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        self.share = share
        self._start = Frozen()

    def start(self, policy: Policy) -> None:
        self._start.start(policy)

    @contextmanager
    def weights(self, policy: Policy) -> Iterator[None]:
        student = policy.hidden

        def between(*args: Any, **options: Any) -> Tensor:
            with self._start.weights(policy):
                start = student(*args, **options).float()
            return torch.lerp(start, student(*args, **options).float(), self.share)

        policy.hidden = between  # the object's own, before the class's: what reads with `policy` reads with both
        try:
            with torch.no_grad():
                yield
        finally:
            del policy.hidden
