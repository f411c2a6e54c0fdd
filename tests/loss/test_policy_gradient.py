"""GRPO against its formula under autograd, by hand on single tokens, and with advantages that a teacher sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ogls.loss.objective import States
from ogls.loss.policy_gradient import GRPO, Scaled, Shifted
from ogls.records import Lesson
from tests.loss.test_objective import gradient_of, make_states, student_logprobs


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


def test_rollouts_or_tokens_count_alike() -> None:
    """GRPO's mean is one over rollouts of means over their tokens; DAPO's is one over all tokens."""
    lesson = Lesson(problem_id="p", prompt_ids=(1,), token_ids=(2, 3, 4, 5), token_weights=(0.0,) * 4, advantage=0.5)
    assert list(GRPO().token_weights(lesson)) == [0.25] * 4
    assert list(GRPO(per="token").token_weights(lesson)) == [1.0] * 4
    assert not any(GRPO().token_weights(replace(lesson, advantage=0.0)))


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


def test_evidence_is_the_log_ratio_of_target_and_anchor_at_the_sampled_token() -> None:
    states = near(make_states())

    def logprobs(hidden: Tensor) -> Tensor:
        return sampled(replace(states, hidden_student=hidden))

    evidence = logprobs(states.hidden_target) - logprobs(states.hidden_anchor)
    for shaping in (Scaled(), Shifted(scale=0.5)):
        loss, extras = GRPO(shaping=shaping)(states)
        torch.testing.assert_close(extras["evidence"], evidence)
        plain, _ = GRPO()(replace(states, advantages=shaping(states.advantages, evidence)))
        torch.testing.assert_close(loss, plain)


def test_a_scaled_advantage_by_hand() -> None:
    advantages, evidence = torch.tensor([1.0, 1.0, -1.0, -2.0, 0.0]), torch.tensor([0.1, 5.0, 0.1, -9.0, 1.0])
    expected = [0.5 + 0.5 * math.exp(0.1), 1.1, -(0.5 + 0.5 * math.exp(-0.1)), -2.2, 0.0]
    torch.testing.assert_close(Scaled(strength=0.5, clip=0.2)(advantages, evidence), torch.tensor(expected))


def test_a_shifted_advantage_by_hand() -> None:
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.3, -0.3, 0.0, 1.0])
    evidence = torch.tensor([9.0, -9.0, 9.0, -9.0, -9.0, 9.0, 9.0, 0.02 * math.atanh(0.03)])
    expected = [1.5, 0.5, -0.5, -1.5, 0.0, 0.0, 0.0, 1.0]  # the last step is 0.015, below the threshold
    torch.testing.assert_close(Shifted()(advantages, evidence), torch.tensor(expected))


@given(st.floats(-3, 3), st.floats(-5, 5))
def test_the_teacher_never_turns_an_advantage(advantage: float, evidence: float) -> None:
    for shaping in (Scaled(), Shifted()):
        shaped = shaping(torch.tensor([advantage]), torch.tensor([evidence])).item()
        assert shaped * advantage >= 0.0
        assert advantage != 0.0 or shaped == 0.0


def test_without_strength_or_where_nobody_read_anything_the_advantage_is_the_groups() -> None:
    states = near(make_states())
    plain, _ = GRPO()(states)
    unread = replace(states, hidden_target=states.hidden_anchor)
    for unshaped in (
        *(GRPO(shaping=shaping)(states) for shaping in (Scaled(strength=0.0), Shifted(strength=0.0))),
        *(GRPO(shaping=shaping)(unread) for shaping in (Scaled(), Shifted())),
    ):
        torch.testing.assert_close(unshaped[0], plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPO(clip_low=1.0), r"GRPO.clip_low must be in \(0, 1\), got 1.0"),
        (lambda: GRPO(clip_high=0.0), r"GRPO.clip_high must be in \(0, 1e6\], got 0.0"),
        (lambda: GRPO(temperature=0.0), r"GRPO.temperature must be in \[0.01, 100\], got 0.0"),
        (lambda: Scaled(strength=1.5), r"Scaled.strength must be in \[0, 1\], got 1.5"),
        (lambda: Scaled(clip=0.0), r"Scaled.clip must be in \(0, 1\), got 0.0"),
        (lambda: Shifted(scale=0.0), r"Shifted.scale must be in \[1e-6, 1e6\], got 0.0"),
    ],
)
def test_parameters_out_of_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
