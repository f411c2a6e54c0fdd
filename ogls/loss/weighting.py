"""Weights of tokens that only student and target together can tell, such as the student's entropy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from ogls.loss.objective import States


class TokenWeighting(ABC):
    """A token weighting multiplies the weights of a distillation's tokens once their states are known.

    It must not depend on which lessons share a micro-batch: rank tokens within `states.lesson_of` only.
    """

    @abstractmethod
    def __call__(
        self, states: States, divergence: Float[Tensor, " tokens"], temperature: float
    ) -> Float[Tensor, " tokens"]:
        """Returns one factor per token, taken as a constant.

        Args:
            states: the tokens of the micro-batch that count
            divergence: D(target, student) of each token, in nats
            temperature: divisor of the logits of both sides
        """
