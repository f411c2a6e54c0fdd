"""GRPO against its formula under autograd, by hand on single tokens, and with advantages that a teacher sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ogls.objective import States
from ogls.policy_gradient import GRPO, Shaping
from tests.test_objective import gradient_of, make_states, student_logprobs


def sampled(states: States, temperature: float = 1.0) -> Tensor:
    return student_logprobs(states, temperature).gather(-1, states.token_ids[:, None]).squeeze(-1)


def near(states: States, temperature: float = 1.0) -> States:
    """Ratios from 0.5 to 2, so that some are clipped on either side."""
    log_ratios = torch.linspace(-0.7, 0.7, len(states.token_ids), dtype=torch.float64)
    return replace(states, old_logprobs=sampled(states, temperature).detach() - log_ratios)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_loss_and_gradient_are_those_of_the_formula(temperature: float, sign: float) -> None:
    states = near(make_states(), temperature)
    states = replace(states, advantages=sign * torch.linspace(0.5, 2.0, 8).double())
    loss, extras = GRPO(clip_low=0.1, clip_high=0.3, temperature=temperature)(states)
    ratio = (sampled(states, temperature) - states.old_logprobs).exp()
    surrogate = torch.minimum(ratio * states.advantages, ratio.clamp(0.9, 1.3) * states.advantages)
    expected = -(states.token_weights * surrogate).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(extras["ratio"], ratio.detach())
    torch.testing.assert_close(gradient_of(loss, states), gradient_of(expected, states), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "moves"),
    [
        (1.0, 2.0, 2.0, True),
        (1.5, 2.0, 2.4, False),  # already likelier than the clip allows: no more of it
        (0.5, 2.0, 1.0, True),  # a right token became unlikelier: bring it back
        (1.5, -2.0, -3.0, True),
        (0.5, -2.0, -1.6, False),
    ],
)
def test_one_token_by_hand(ratio: float, advantage: float, value: float, moves: bool) -> None:
    states = make_states(num_tokens=1)
    states = replace(
        states,
        token_weights=torch.ones(1).double(),
        old_logprobs=(sampled(states) - torch.tensor(ratio).double().log()).detach(),
        advantages=torch.tensor([advantage]).double(),
    )
    loss, extras = GRPO()(states)
    assert -loss.item() == pytest.approx(value)
    assert bool(gradient_of(loss, states).any()) == moves
    assert extras["clip_fraction"].item() == float(not moves)


def test_on_policy_its_gradient_is_reinforce() -> None:
    states = make_states()
    logprob = sampled(states)
    states = replace(states, old_logprobs=logprob.detach())
    loss, _ = GRPO()(states)
    reinforce = -(states.token_weights * states.advantages * logprob).sum()
    torch.testing.assert_close(gradient_of(loss, states), gradient_of(reinforce, states), rtol=1e-9, atol=1e-12)


def test_a_token_that_has_become_a_thousand_times_likelier_stays_finite() -> None:
    states = make_states()
    states = replace(states, old_logprobs=torch.full((8,), -1e4).double(), advantages=-torch.ones(8).double())
    loss, _ = GRPO()(states)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient_of(loss, states)).all()


def test_the_teacher_sizes_advantages_and_never_turns_them() -> None:
    states = near(make_states())
    shaping = Shaping(strength=0.5, clip=0.2)
    shaped, evidence = shaping(states, states.advantages, 1.0)

    def logprobs(hidden: Tensor) -> Tensor:
        return sampled(replace(states, hidden_student=hidden))

    expected = logprobs(states.hidden_target) - logprobs(states.hidden_anchor)
    torch.testing.assert_close(evidence, expected)
    size = (states.advantages.sign() * expected).exp().clamp(0.8, 1.2)
    torch.testing.assert_close(shaped, states.advantages * (0.5 + 0.5 * size))
    assert (shaped.sign() == states.advantages.sign()).all()
    loss, extras = GRPO(shaping=shaping)(states)
    plain, _ = GRPO()(replace(states, advantages=shaped))
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(extras["evidence"], expected)


def test_without_strength_or_where_nobody_read_anything_the_advantage_is_the_groups() -> None:
    states = near(make_states())
    plain, _ = GRPO()(states)
    for unshaped in (
        GRPO(shaping=Shaping(strength=0.0))(states),
        GRPO(shaping=Shaping())(replace(states, hidden_target=states.hidden_anchor)),
    ):
        torch.testing.assert_close(unshaped[0], plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPO(clip_low=1.0), "clip_low in"),
        (lambda: GRPO(clip_high=0.0), "clip_high > 0"),
        (lambda: GRPO(temperature=0.0), "temperature > 0, got temperature=0.0"),
        (lambda: Shaping(strength=1.5), "strength in \\[0, 1\\], got 1.5"),
        (lambda: Shaping(clip=0.0), "clip in \\(0, 1\\), got 0.0"),
    ],
)
def test_parameters_out_of_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
