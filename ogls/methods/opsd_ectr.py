"""OPSD_ECTR distils towards a right attempt and away from a wrong one.

It is ``opsd_ectr`` in the released code of RLCSD (arXiv 2606.11709, section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ogls.lessons.privilege import PeerOutcomes, Privilege
from ogls.loss.chunked import chunked_divergence
from ogls.loss.divergence import ForwardKL
from ogls.loss.objective import Distillation, Objective, States
from ogls.loss.steering import Coefficients, Steering, difference, mean_of
from ogls.loss.weighting import TokenWeighting
from ogls.methods.base import Method
from ogls.records import Role
from ogls.system.ranges import POSITIVE, check


@dataclass(frozen=True)
class ContrastGuidance(Steering):
    """Contrast guidance moves the success view's teacher away from the failure view's.

        target = softmax((1 + alpha) log p+ - alpha log p-) = softmax(W (h+ + alpha (h+ - h-)) + b)

    Args:
        alpha: strength of the move, above 0
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        check(self, {"alpha": "(0, 1000]"})

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        right = mean_of(roles, "success")
        return right, difference(right, mean_of(roles, "failure"))

    def alpha_at(self, step: int) -> float:
        return self.alpha


@dataclass(frozen=True)
class ContrastWeight(TokenWeighting):
    """Contrast weighting quiets tokens about which the views of right and wrong attempts agree.

        factor_t = K_t / (K_t + tau)        K_t = KL(p+ || p-) of the teacher's two views, in nats

    The factors are below 1 and not scaled up: as released, the step's mean is over all tokens.

    Args:
        tau: KL, in nats, at which a token counts half
        alpha: strength of the `ContrastGuidance` that makes the target
    """

    tau: float = 1.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        check(self, {"tau": POSITIVE, "alpha": "(0, 1000]"})

    def __call__(
        self, states: States, divergence: Float[Tensor, " tokens"], temperature: float
    ) -> Float[Tensor, " tokens"]:
        right, target = states.hidden_anchor, states.hidden_target
        if right is None or target is None:
            raise ValueError("ContrastWeight needs the states of anchor and target, got None")
        wrong = right - (target - right) / self.alpha
        contrast, _ = chunked_divergence(wrong, right, *states.target_head, ForwardKL(), temperature=temperature)
        contrast = contrast.clamp(min=0.0)
        return contrast / (contrast + self.tau)


@dataclass(frozen=True, kw_only=True)
class OPSD_ECTR(Method):
    """OPSD_ECTR distils towards a right attempt and away from a wrong one, where the two differ.

        target_t = softmax(1.5 log p+_t - 0.5 log p-_t)        p±: the teacher, frozen, reads a right / wrong peer
        loss     = mean_t K_t / (K_t + 1) KL(target_t || student_t)        K_t = KL(p+_t || p-_t)

    The released code has alpha 0.5, tau 1, summands of at most 0.05, and rollouts at temperature 1 from the 20
    likeliest tokens within a mass of 0.95; it learns right rollouts, too. Two parts of it are left out here: the
    support of 100 tokens and a tail, on which log p- is held above -5, and the importance ratio, which needs rollouts
    that are drawn from the whole distribution.

    Raises:
        ValueError: the weighting takes another alpha than the steering.
    """

    privilege: Privilege = PeerOutcomes(max_peers=1, exclude_self=True, use_solution=False, learn_successes=True)
    steering: Steering = ContrastGuidance(0.5)
    objective: Objective = Distillation(ForwardKL(), clip=0.05, one_sided=True, weighting=ContrastWeight())
    top_p: float = 0.95
    top_k: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for _, term in self.objective.terms:
            weighting = term.weighting if isinstance(term, Distillation) else None
            if isinstance(weighting, ContrastWeight) and self.steering != ContrastGuidance(weighting.alpha):
                raise ValueError(
                    f"ContrastWeight takes the target for ContrastGuidance(alpha={weighting.alpha}), got "
                    f"{self.steering}: change one of them"
                )
