"""A token weighting scales each token's weight by what student and target say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from ogls.loss.objective import States


class TokenWeighting(ABC):
    """A token weighting multiplies the weights of a distillation's tokens, for example by the student's entropy.

    It must not depend on which lessons share a micro-batch: tokens may be ranked within their own lesson only
    (`states.lesson_of`).
    """

    @abstractmethod
    def __call__(
        self, states: States, divergence: Float[Tensor, " tokens"], temperature: float
    ) -> Float[Tensor, " tokens"]:
        """Returns one factor per token, through which no gradient flows.

        Args:
            states: tokens of the micro-batch that count, with the states of student and target
            divergence: D(target, student) of each token, in nats
            temperature: divisor of the logits of both sides
        """
