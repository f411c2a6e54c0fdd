"""Objectives: weighted sums that add up over micro-batches, and extras that agree with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ogls.loss.divergence import ForwardKL, JensenShannon, ReverseKL
from ogls.loss.objective import Distillation, Likelihood, Mixture, States, Term
from ogls.loss.policy_gradient import GRPO, Scaled, Shifted
from ogls.loss.topk import TopK
from ogls.records import Lesson, View

T, V, H = 8, 13, 5


def make_states(seed: int = 0, num_tokens: int = T) -> States:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return States(
        hidden_student=normal(num_tokens, H).requires_grad_(),
        hidden_target=normal(num_tokens, H),
        hidden_anchor=normal(num_tokens, H),
        weight=normal(V, H),
        bias=normal(V),
        token_ids=torch.randint(V, (num_tokens,), generator=generator),
        token_weights=torch.linspace(0.0, 2.0, num_tokens, dtype=torch.float64),
        old_logprobs=-4 * normal(num_tokens).abs() - 1,
        advantages=normal(num_tokens),
    )


def rows(states: States, index: slice) -> States:
    of_tokens = ("hidden_student", "hidden_target", "hidden_anchor", "token_ids", "token_weights")
    picked = {name: getattr(states, name)[index] for name in (*of_tokens, "old_logprobs", "advantages")}
    return replace(states, **picked)


def student_logprobs(states: States, temperature: float = 1.0) -> Tensor:
    z = torch.nn.functional.linear(states.hidden_student, states.weight, states.bias) / temperature
    return z.log_softmax(-1)


def gradient_of(loss: Tensor, states: States) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, states.hidden_student)
    return gradient


OBJECTIVES = [
    Distillation(),
    Distillation(JensenShannon(), temperature=1.1, clip=0.05),
    Distillation(ForwardKL(), clip=0.05, one_sided=True),
    Distillation(ReverseKL(), importance_cap=2.0),
    Distillation(JensenShannon(), support=TopK(3, "union")),
    Likelihood(),
    GRPO(temperature=1.2),
    GRPO(shaping=Scaled()),
    GRPO(shaping=Shifted()),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sizes", [[8], [1] * 8, [3, 5]])
def test_micro_batches_add_up(objective: Term, sizes: list[int]) -> None:
    states = make_states()
    loss, _ = objective(states)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [objective(rows(states, slice(a, a + n)))[0] for a, n in zip(starts, sizes, strict=True)]
    split = torch.stack(parts).sum()
    torch.testing.assert_close(split, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_of(split, states), gradient_of(loss, states), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_tokens_is_exactly_zero_with_its_graph(objective: Term) -> None:
    states = make_states()
    loss, extras = objective(rows(states, slice(0, 0)))
    assert loss.item() == 0.0
    assert torch.equal(gradient_of(loss, states), torch.zeros(T, H, dtype=torch.float64))
    assert all(value.shape == (0,) for value in extras.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weight_zero_leaves_a_token_out(objective: Term) -> None:
    states = make_states()
    loss, _ = objective(states)
    assert states.token_weights[0] == 0.0
    assert torch.equal(gradient_of(loss, states)[0], torch.zeros(H, dtype=torch.float64))
    torch.testing.assert_close(objective(rows(states, slice(1, T)))[0], loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tokens_are_picked_by_their_weight(objective: Term) -> None:
    states = make_states()
    weights = torch.tensor([0, 2, 0, 0, 1, 1, 0, 0.5]).double()
    picked = objective(states.weighted(weights))
    whole = objective(replace(states, token_weights=weights))
    torch.testing.assert_close(picked[0], whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_of(picked[0], states), gradient_of(whole[0], states), rtol=1e-10, atol=1e-12)
    for name, values in picked[1].items():
        torch.testing.assert_close(values, whole[1][name][weights != 0], rtol=1e-10, atol=1e-12)


PLAIN = Lesson(problem_id="p", prompt_ids=(1,), token_ids=(2, 3, 4), weights=(1.0, 0.5, 0.0))
VIEWED = replace(PLAIN, views=(View(role="plain", prefix_ids=(1,)), View(role="success", prefix_ids=(5,))))


def test_each_term_takes_the_tokens_that_are_meant_for_it() -> None:
    """By hand: weights go to distillation where somebody has read something, to the likelihood where nobody has."""
    reinforced = replace(VIEWED, advantage=-0.5)
    assert [tuple(Distillation().weights_of(lesson)) for lesson in (PLAIN, VIEWED)] == [(0, 0, 0), (1, 0.5, 0)]
    assert [tuple(Likelihood().weights_of(lesson)) for lesson in (PLAIN, VIEWED)] == [(1, 0.5, 0), (0, 0, 0)]
    assert [tuple(GRPO(per="token").weights_of(lesson)) for lesson in (VIEWED, reinforced)] == [(0, 0, 0), (1, 1, 1)]
    assert sum(GRPO().weights_of(reinforced)) == pytest.approx(1)
    assert (VIEWED.num_learned, reinforced.num_learned, reinforced.num_weighted) == (2, 3, 2)


def test_a_mixture_is_its_terms_and_needs_what_they_need() -> None:
    inner = Mixture((Likelihood(), Distillation(importance_cap=2.0)), (0.5, 2.0))
    mixture = Mixture((GRPO(), inner), (1.0, 3.0))
    assert mixture.terms == ((1.0, GRPO()), (1.5, Likelihood()), (6.0, Distillation(importance_cap=2.0)))
    assert mixture.needs_teacher
    assert mixture.needs_advantage
    assert not mixture.corrects_staleness
    assert Mixture((GRPO(), Distillation(importance_cap=2.0)), (1.0, 1.0)).corrects_staleness
    assert not Mixture((GRPO(), Likelihood()), (1.0, 1.0)).needs_teacher
    with pytest.raises(ValueError, match="one factor an objective, got 1 for 2"):
        Mixture((GRPO(), Likelihood()), (1.0,))
    with pytest.raises(ValueError, match="factors above 0"):
        Mixture((GRPO(), Likelihood()), (1.0, 0.0))


def test_distillation_is_the_weighted_sum_of_its_divergences() -> None:
    states = make_states()
    loss, extras = Distillation(temperature=1.3)(states)
    assert not extras["divergence"].requires_grad
    torch.testing.assert_close(loss, (states.token_weights * extras["divergence"]).sum())
    logprobs = student_logprobs(states, 1.3)
    expected = logprobs.gather(-1, states.token_ids[:, None]).squeeze(-1).detach()
    torch.testing.assert_close(extras["logprob"], expected)


def test_importance_ratio_is_a_capped_constant() -> None:
    states = make_states()
    assert states.old_logprobs is not None
    loss, extras = Distillation(importance_cap=1.5)(states)
    ratio = torch.minimum((extras["logprob"] - states.old_logprobs).exp(), torch.tensor(1.5).double())
    assert (ratio == 1.5).any()
    assert (ratio < 1.5).any()
    weighted, _ = Distillation()(replace(states, token_weights=states.token_weights * ratio))
    torch.testing.assert_close(loss, weighted)
    torch.testing.assert_close(gradient_of(loss, states), gradient_of(weighted, states))


def test_likelihood_is_cross_entropy() -> None:
    states = make_states()
    loss, extras = Likelihood()(states)
    z = torch.nn.functional.linear(states.hidden_student, states.weight, states.bias)
    each = torch.nn.functional.cross_entropy(z, states.token_ids, reduction="none")
    torch.testing.assert_close(loss, (states.token_weights * each).sum())
    torch.testing.assert_close(-extras["logprob"], each.detach())
    expected = gradient_of((states.token_weights * each).sum(), states)
    torch.testing.assert_close(gradient_of(loss, states), expected, rtol=1e-10, atol=1e-12)


def test_likelihood_needs_no_teacher() -> None:
    assert Distillation().needs_teacher
    assert not Likelihood().needs_teacher
    Likelihood()(replace(make_states(), hidden_target=None, old_logprobs=None))
    GRPO()(replace(make_states(), hidden_target=None, hidden_anchor=None))


def test_missing_states_are_named() -> None:
    states = make_states()
    with pytest.raises(ValueError, match="got hidden_target=None"):
        Distillation()(replace(states, hidden_target=None))
    with pytest.raises(ValueError, match="got old_logprobs=None"):
        Distillation(importance_cap=2.0)(replace(states, old_logprobs=None))
    with pytest.raises(ValueError, match="GRPO needs advantages and the sampler's log-probs"):
        GRPO()(replace(states, old_logprobs=None))
    with pytest.raises(ValueError, match="shaping needs the states of target and anchor"):
        GRPO(shaping=Scaled())(replace(states, hidden_anchor=None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature > 0, got temperature=0.0"),
        ({"temperature": float("nan")}, "got temperature=nan"),
        ({"clip": 0.0}, "clip > 0, or none, got clip=0.0"),
        ({"one_sided": True}, "got clip=None"),
        ({"importance_cap": -1.0}, "importance_cap > 0, or none, got -1.0"),
    ],
)
def test_parameters_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**arguments)
