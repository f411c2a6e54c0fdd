"""Objectives: weighted sums that add up over micro-batches, and extras that agree with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ogls.loss.divergence import ForwardKL, JensenShannon, ReverseKL
from ogls.loss.objective import Distillation, Likelihood, Mixture, ReferenceKL, States, Target, Term, per_token
from ogls.loss.policy_gradient import GRPO, Scaled, Shifted
from ogls.loss.steering import OutcomeSteering, Plain, PositiveMean, Steered, Unsteered
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
        head_weight=normal(V, H),
        head_bias=normal(V),
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
    z = torch.nn.functional.linear(states.hidden_student, states.head_weight, states.head_bias) / temperature
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
    ReferenceKL(),
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


PLAIN = Lesson(problem_id="p", prompt_ids=(1,), token_ids=(2, 3, 4), token_weights=(1.0, 0.5, 0.0))
VIEWED = replace(PLAIN, views=(View(role="plain", prefix_ids=(1,)), View(role="success", prefix_ids=(5,))))


def test_each_term_takes_the_tokens_that_are_meant_for_it() -> None:
    """By hand: weights go to distillation where somebody has read something, to the likelihood where nobody has."""
    reinforced = replace(VIEWED, advantage=-0.5)
    assert [tuple(Distillation().token_weights(lesson)) for lesson in (PLAIN, VIEWED)] == [(0, 0, 0), (1, 0.5, 0)]
    assert [tuple(Likelihood().token_weights(lesson)) for lesson in (PLAIN, VIEWED)] == [(1, 0.5, 0), (0, 0, 0)]
    assert [tuple(GRPO(per="token").token_weights(lesson)) for lesson in (VIEWED, reinforced)] == [(0, 0, 0), (1, 1, 1)]
    assert sum(GRPO().token_weights(reinforced)) == pytest.approx(1)
    assert (VIEWED.num_learned, reinforced.num_learned, reinforced.num_weighted) == (2, 3, 2)


def test_a_mixture_is_its_terms_and_needs_what_they_need() -> None:
    inner = Mixture([Likelihood(), Distillation(importance_cap=2.0)], [0.5, 2.0])
    mixture = Mixture([GRPO(), inner], [1.0, 3.0])
    assert mixture.terms == ((1.0, GRPO()), (1.5, Likelihood()), (6.0, Distillation(importance_cap=2.0)))
    assert [set(term.needs) for _, term in mixture.terms] == [
        {"rollouts", "peers", "advantages", "logprobs"},
        set(),
        {"logprobs"},
    ]
    assert Mixture([GRPO(), Likelihood()]).terms == ((1.0, GRPO()), (1.0, Likelihood()))
    with pytest.raises(ValueError, match="one factor per objective, or none, got 1 for 2 objectives"):
        Mixture([GRPO(), Likelihood()], [1.0])
    with pytest.raises(ValueError, match="one factor per objective, or none, got 0 for 0 objectives"):
        Mixture([])
    with pytest.raises(ValueError, match=r"Mixture.factors must be in \(0, 1e6\], got 0.0"):
        Mixture([GRPO(), Likelihood()], [1.0, 0.0])
    with pytest.raises(ValueError, match=r"Mixture.factors must be in"):
        Mixture([GRPO(), Likelihood()], [1.0, float("nan")])


def test_a_mixture_keeps_lists_of_its_own() -> None:
    objectives, factors = [GRPO(), Likelihood()], [1.0, 0.5]
    mixture = Mixture(objectives, factors)
    objectives.pop()
    factors[0] = 2.0
    assert mixture == Mixture([GRPO(), Likelihood()], [1.0, 0.5])


def test_each_term_learns_towards_its_own_target() -> None:
    steering = OutcomeSteering(2.0)
    assert Distillation().target(steering) == Target("teacher", steering)
    assert Distillation(steering=PositiveMean()).target(steering) == Target("teacher", PositiveMean())
    assert GRPO(shaping=Scaled()).target(steering) == Target("teacher", steering)
    assert ReferenceKL().target(steering) == Target("start", Plain())
    assert ReferenceKL(steering=Unsteered()).target(steering) == Target("start", Unsteered())
    assert GRPO().target(steering) is Likelihood().target(steering) is None


def test_the_teacher_scores_no_token_in_vain() -> None:
    reinforced, unread = replace(VIEWED, advantage=-0.5), replace(PLAIN, advantage=1.0)
    lessons = (PLAIN, VIEWED, reinforced, unread)
    for term in (Distillation(), GRPO(shaping=Shifted())):
        assert [term.num_scored(lesson) for lesson in lessons] == [0, 2, 2, 0]
    assert [ReferenceKL().num_scored(lesson) for lesson in lessons] == [2, 2, 3, 3]


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
    z = torch.nn.functional.linear(states.hidden_student, states.head_weight, states.head_bias)
    each = torch.nn.functional.cross_entropy(z, states.token_ids, reduction="none")
    torch.testing.assert_close(loss, (states.token_weights * each).sum())
    torch.testing.assert_close(-extras["logprob"], each.detach())
    expected = gradient_of((states.token_weights * each).sum(), states)
    torch.testing.assert_close(gradient_of(loss, states), expected, rtol=1e-10, atol=1e-12)


def test_likelihood_needs_no_teacher() -> None:
    Likelihood()(replace(make_states(), hidden_target=None, old_logprobs=None))
    GRPO()(replace(make_states(), hidden_target=None, hidden_anchor=None))


REINFORCED = replace(PLAIN, token_ids=(2, 3, 4, 5), token_weights=(0.0,) * 4, advantage=-0.5)
LEARNED = (REINFORCED, VIEWED, replace(VIEWED, advantage=1.0), PLAIN)  # 4, 2, 3 and 2 tokens


def kl_to_start(student: Tensor, start: Tensor, weight: Tensor, bias: Tensor | None, per: str) -> Tensor:
    """KL(student || start) from full logits: the mean over lessons of the mean over tokens, or over all tokens."""
    p, q = (torch.nn.functional.linear(hidden, weight, bias).softmax(-1) for hidden in (student, start))
    each = (p * (p / q).log()).sum(-1)
    return torch.stack([part.mean() for part in each.split([4, 2, 3, 2])]).mean() if per == "sequence" else each.mean()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_the_kl_to_the_start_is_exact_over_all_learned_tokens(per: Any, has_bias: bool) -> None:
    states = make_states(num_tokens=11)
    student, start, weight = states.hidden_student, states.hidden_target, states.head_weight
    assert start is not None
    bias = states.head_bias if has_bias else None
    term, target = ReferenceKL(per=per), Steered(anchor=start, direction=torch.zeros_like(start), alpha=0.0)
    made = States.of(LEARNED, student, (weight, bias)).towards(target)
    value, extras = term(made.weighted(per_token(LEARNED, term.token_weights, student)))
    loss = value / sum(sum(term.token_weights(lesson)) for lesson in LEARNED)
    expected = kl_to_start(student, start, weight, bias, per)
    assert expected > 0.1
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient_of(loss, states), gradient_of(expected, states), rtol=1e-6, atol=1e-9)
    assert extras.keys() == {"kl_to_reference"}
    torch.testing.assert_close(extras["kl_to_reference"].mean(), kl_to_start(student, start, weight, bias, "token"))


def test_the_kl_to_the_start_counts_rollouts_or_tokens_alike() -> None:
    assert [tuple(ReferenceKL().token_weights(lesson)) for lesson in LEARNED] == [
        (1 / 4,) * 4,
        (1 / 2, 1 / 2, 0),
        (1 / 3,) * 3,
        (1 / 2, 1 / 2, 0),
    ]
    assert [sum(ReferenceKL(per="token").token_weights(lesson)) for lesson in LEARNED] == [4, 2, 3, 2]
    nothing = replace(PLAIN, token_weights=(0.0,) * 3)
    assert [tuple(ReferenceKL(per=per).token_weights(nothing)) for per in ("sequence", "token")] == [(0, 0, 0)] * 2


def test_at_the_start_there_is_no_kl_and_no_gradient() -> None:
    states = make_states()
    loss, _ = ReferenceKL()(replace(states, hidden_target=states.hidden_student.detach()))
    assert loss.item() == 0.0
    assert not gradient_of(loss, states).any()


def test_a_written_text_beside_sampled_ones_is_nothing_to_a_term_that_leaves_it_out() -> None:
    """The sampler's log-probs are there for a term whose tokens were all sampled, whatever else is in the batch."""
    sampled, written = replace(REINFORCED, logprobs=(-1.0, -2.0, -3.0, -4.0)), PLAIN
    states = make_states(num_tokens=6)
    made = States.of((sampled, written), states.hidden_student, (states.head_weight, None))

    def of(term: Term, lessons: tuple[Lesson, ...] = (sampled, written)) -> States:
        return made.weighted(per_token(lessons, term.token_weights, made.hidden_student))

    assert of(GRPO()).old_logprobs is not None
    assert of(GRPO()).old_logprobs.tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert of(Likelihood()).old_logprobs is None
    assert of(ReferenceKL()).old_logprobs is None
    only = States.of((written,), states.hidden_student[:2], (states.head_weight, None))
    nothing = only.weighted(per_token((written,), GRPO().token_weights, only.hidden_student))
    assert GRPO()(nothing)[0].item() == 0.0


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
        ({"temperature": 0.0}, r"Distillation.temperature must be in \[0.01, 100\], got 0.0"),
        ({"temperature": float("nan")}, "temperature must be in .*, got nan"),
        ({"clip": 0.0}, r"Distillation.clip must be in \(0, 1e6\], got 0.0"),
        ({"one_sided": True}, "got clip=None"),
        ({"importance_cap": -1.0}, r"Distillation.importance_cap must be in \(0, 1e6\], got -1.0"),
    ],
)
def test_parameters_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**arguments)
