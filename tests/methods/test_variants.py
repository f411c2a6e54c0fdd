"""Each variant's one class by hand or by another formula, its weights under micro-batches, and two steps of each."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from torch import Tensor

import ogls.methods
from ogls.data import RolloutDataModule
from ogls.lessons.privilege import LessonDraft, Privilege
from ogls.lessons.prompts import PromptEncoder, Prompts
from ogls.lessons.selection import AllTokens
from ogls.loss.divergence import ForwardKL, ReverseKL
from ogls.loss.objective import Distillation, States
from ogls.loss.policy_gradient import GRPO
from ogls.loss.steering import Steered, Unsteered
from ogls.loss.weighting import TokenWeighting
from ogls.methods import (
    OPSD,
    OPSD_ECTR,
    SSOPD,
    TIP,
    U_OPSD,
    HighEntropyOPSD,
    Method,
    SampledTokenOPSD,
    SDZero,
)
from ogls.methods.high_entropy import HighEntropy
from ogls.methods.opsd_ectr import ContrastGuidance, ContrastWeight
from ogls.methods.sampled_token import SampledToken
from ogls.methods.sd_zero import OwnVerdict
from ogls.methods.ssopd import ShortestForLongest
from ogls.methods.tip import SoftOr
from ogls.methods.u_opsd import Consensus
from ogls.module import SelfDistillation
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.pretrained import load_tokenizer
from ogls.records import Batch, Completion, Problem, Rollout, RolloutGroup, Sampling, Verdict
from ogls.rollout.accuracy import Evaluation
from ogls.tasks.chains import Chain, Chains
from tests.scripted import ScriptedEngine

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
VARIANTS: dict[str, type[Method]] = {
    "high_entropy": HighEntropyOPSD,
    "sampled_token": SampledTokenOPSD,
    "sd_zero": SDZero,
    "tip": TIP,
    "opsd_ectr": OPSD_ECTR,
    "u_opsd": U_OPSD,
    "ssopd": SSOPD,
}
V, H = 11, 5
LN2 = math.log(2.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_states(lengths: Sequence[int] = (7, 4, 12, 1)) -> States:
    """Random states of several lessons, in fp64."""
    count = sum(lengths)
    return States(
        hidden_student=normal(count, H, seed=1).requires_grad_(),
        hidden_target=normal(count, H, seed=2),
        hidden_anchor=normal(count, H, seed=3),
        head_weight=normal(V, H, seed=4),
        head_bias=normal(V, seed=5),
        token_ids=torch.arange(count) % V,
        token_weights=0.5 + normal(count, seed=6).abs(),
        lesson_of=torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)]),
        old_logprobs=-normal(count, seed=7).abs() - 1,
    )


def of_logits(student: Sequence[Sequence[float]], **others: Any) -> States:
    """States of one lesson whose logits are the rows given: the head is the identity."""
    logits = torch.tensor(student, dtype=torch.float64)
    made = States(
        hidden_student=logits,
        head_weight=torch.eye(logits.shape[1], dtype=torch.float64),
        token_ids=torch.zeros(len(logits), dtype=torch.long),
        token_weights=torch.ones(len(logits), dtype=torch.float64),
        lesson_of=torch.zeros(len(logits), dtype=torch.long),
    )
    return replace(made, **others)


def rows(states: States, index: Tensor) -> States:
    of_tokens = ("hidden_student", "hidden_target", "hidden_anchor", "token_ids", "token_weights", "lesson_of")
    return replace(states, **{name: getattr(states, name)[index] for name in (*of_tokens, "old_logprobs")})


def log_probs(hidden: Tensor, states: States, temperature: float = 1.0) -> Tensor:
    return torch.nn.functional.linear(hidden, states.head_weight, states.head_bias).div(temperature).log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# ---- weightings: of student and target, within a rollout ----

WEIGHTINGS = [HighEntropy(0.3), SoftOr(0.5), ContrastWeight(0.7)]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_a_weight_does_not_depend_on_who_shares_the_micro_batch(weighting: TokenWeighting, temperature: float) -> None:
    states, divergence = make_states(), normal(24, seed=8).abs()
    whole = weighting(states, divergence, temperature)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(weighting(rows(states, order), divergence[order], temperature), whole[order])
    assert states.lesson_of is not None
    for lessons in ([0], [1], [2], [3], [0, 2], [3, 1, 2]):
        own = torch.cat([(states.lesson_of == lesson).nonzero().squeeze(1) for lesson in lessons])
        torch.testing.assert_close(weighting(rows(states, own), divergence[own], temperature), whole[own])
    assert not whole.requires_grad


@pytest.mark.parametrize("weighting", WEIGHTINGS[:2], ids=str)
def test_kept_tokens_have_the_weight_of_all(weighting: TokenWeighting) -> None:
    states = make_states()
    factors = weighting(states, normal(24, seed=8).abs(), 1.0)
    assert states.lesson_of is not None
    for lesson, length in enumerate((7, 4, 12, 1)):
        own = states.lesson_of == lesson
        weights = states.token_weights[own]
        torch.testing.assert_close((factors[own] * weights).sum(), weights.sum())
        assert (factors[own] > 0).sum() == max(1, round(length * weighting.share))  # pyright: ignore


def test_high_entropy_by_hand() -> None:
    """Entropies 0, log 3, log 2, 0, about 0: of five tokens the 40 % that are kept are the second and the third."""
    logits = [[99.0, 0.0, 0.0], [0.0, 0.0, 0.0], [50.0, 50.0, -99.0], [0.0, -99.0, -99.0], [9.0, 0.0, 0.0]]
    states = of_logits(logits)
    assert HighEntropy(0.4)(states, torch.zeros(5).double(), 1.0).tolist() == [0.0, 2.5, 2.5, 0.0, 0.0]
    weighted = replace(states, token_weights=torch.tensor([1.0, 2.0, 4.0, 1.0, 2.0]).double())
    assert HighEntropy(0.4)(weighted, torch.zeros(5).double(), 1.0).tolist() == [0.0, 10 / 6, 10 / 6, 0.0, 0.0]
    assert HighEntropy(0.01)(states, torch.zeros(5).double(), 1.0).tolist() == [0.0, 5.0, 0.0, 0.0, 0.0]


def test_the_entropy_is_that_of_the_distillations_temperature() -> None:
    """(2, 2, -9) and (3, 0, 0) have entropies of 0.69 and 0.37 at temperature 1, but of 0.74 and 1.08 at 8."""
    states = of_logits([[2.0, 2.0, -9.0], [3.0, 0.0, 0.0]])
    for temperature, kept in ((1.0, [2.0, 0.0]), (8.0, [0.0, 2.0])):
        assert HighEntropy(0.5)(states, torch.zeros(2).double(), temperature).tolist() == kept


def test_high_entropy_opsd_is_the_mean_kl_of_the_kept_tokens() -> None:
    states = replace(make_states((20,)), token_weights=torch.ones(20).double())
    (objective,) = (term for _, term in HighEntropyOPSD().objective.terms)
    log_s, log_t = (log_probs(h, states, 1.1) for h in (states.hidden_student, states.hidden_target))
    kept = sorted(range(20), key=lambda t: (log_s[t].exp() * log_s[t]).sum().item())[:4]
    summands = (log_t.exp() * (log_t - log_s)).clamp(max=0.05)
    loss, _ = objective(states)
    torch.testing.assert_close(loss / 20, summands.sum(-1)[kept].mean(), rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, states.hidden_student)
    assert set(gradient.abs().sum(-1).nonzero().squeeze(1).tolist()) == set(kept)


def test_soft_or_by_hand() -> None:
    """Entropies log 3, log 2, 0, 0, and divergences 0, 1, 2, 1: only the last is neither unsure nor far off.

    h = (1, log 2 / log 3, 0, 0), d = (0, 1/2, 1, 1/2): scores 1, 0.82, 1, 0.5.
    """
    logits = [[0.0, 0.0, 0.0], [50.0, 50.0, -99.0], [99.0, 0.0, 0.0], [0.0, -99.0, -99.0]]
    states, divergence = of_logits(logits), torch.tensor([0.0, 1.0, 2.0, 1.0]).double()
    kept = SoftOr(0.75, entropy_quantile=1.0)
    assert kept(states, divergence, 1.0).tolist() == [4 / 3, 4 / 3, 4 / 3, 0.0]
    assert SoftOr(0.5, entropy_quantile=1.0)(states, divergence, 1.0).tolist() == [2.0, 0.0, 2.0, 0.0]
    sure = HighEntropy(0.5)(states, divergence, 1.0).tolist()
    assert sure == [2.0, 2.0, 0.0, 0.0]  # entropy alone misses the token that is sure and far off


def test_soft_or_is_its_formula() -> None:
    states, divergence = make_states((31,)), normal(31, seed=8).abs()
    log_s = log_probs(states.hidden_student, states)
    entropy = sorted(h := (-(log_s.exp() * log_s).sum(-1)).tolist())
    place = 0.98 * 30  # the quantile lies between two of the sorted values
    cut = entropy[int(place)] + (place - int(place)) * (entropy[int(place) + 1] - entropy[int(place)])
    scores = []
    for value, d in zip(h, divergence.tolist(), strict=True):
        a = (min(value, cut) - entropy[0]) / (cut - entropy[0])
        b = (d - divergence.min().item()) / (divergence.max() - divergence.min()).item()
        scores.append(1 - (1 - a) * (1 - b))
    expected = sorted(range(31), key=lambda t: -scores[t])[: round(15.5)]
    assert SoftOr()(states, divergence, 1.0).nonzero().squeeze(1).tolist() == sorted(expected)


def test_soft_or_where_all_entropies_or_all_tokens_are_the_same() -> None:
    """Then the divergence alone decides, or else the place: earlier tokens are kept."""
    states = of_logits([[1.0, 0.0]] * 400)
    first, last = [2.0] * 200 + [0.0] * 200, [0.0] * 200 + [2.0] * 200
    assert SoftOr()(states, torch.zeros(400).double(), 1.0).tolist() == first
    assert SoftOr()(states, torch.arange(400.0).double(), 1.0).tolist() == last


def test_tip_is_the_mean_reverse_kl_of_the_kept_tokens() -> None:
    states = replace(make_states((20,)), token_weights=torch.ones(20).double())
    (objective,) = (term for _, term in TIP().objective.terms)
    log_s, log_t = (log_probs(h, states) for h in (states.hidden_student, states.hidden_target))
    divergence = kl(log_s, log_t)
    kept = SoftOr()(states, divergence.detach(), 1.0) > 0
    assert kept.sum() == 10
    loss, _ = objective(states)
    torch.testing.assert_close(loss / 20, divergence[kept].mean(), rtol=1e-10, atol=1e-12)


def test_shares_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"share in \(0, 1\], got 0.0"):
        HighEntropy(0.0)
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 1.5 and 0.98"):
        SoftOr(1.5)
    with pytest.raises(ValueError, match=r"ContrastWeight.tau must be in \(0, 1e6\], got 0\.0"):
        ContrastWeight(0.0)
    with pytest.raises(ValueError, match=r"ContrastGuidance.alpha must be in \(0, 1000\], got 0\.0"):
        ContrastGuidance(0.0)
    with pytest.raises(ValueError, match="needs lesson_of, got None"):
        HighEntropy()(of_logits([[1.0, 0.0]], lesson_of=None), torch.zeros(1).double(), 1.0)


# ---- the sampled token ----


def test_the_sampled_token_by_hand() -> None:
    """Student (1/2, 1/4, 1/4), target (1/4, 1/4, 1/2): A = -ln 2, 0, ln 2 for the three tokens.

    With a sampler that gave them 1/2, 1/4, 1/8, the ratios are 1, 1, 2, and the sum is ln 2 - 0 - 2 ln 2. The gradient
    is -r A (one-hot - p): ln 2 (1/2, -1/4, -1/4), 0, and -2 ln 2 (-1/2, -1/4, 3/4).
    """
    student, target = torch.tensor([0.5, 0.25, 0.25]).double().log(), torch.tensor([0.25, 0.25, 0.5]).double().log()
    states = of_logits(
        [student.tolist()] * 3,
        hidden_student=(hidden := student.repeat(3, 1).requires_grad_()),
        hidden_target=target.expand(3, 3),
        token_ids=torch.arange(3),
        old_logprobs=torch.tensor([0.5, 0.25, 0.125]).double().log(),
    )
    loss, extras = SampledToken()(states)
    assert extras["advantage"].tolist() == pytest.approx([-LN2, 0.0, LN2])
    assert extras["logprob"].tolist() == pytest.approx([-LN2, -2 * LN2, -2 * LN2])
    assert loss.item() == pytest.approx(-LN2)
    (gradient,) = torch.autograd.grad(loss, hidden)
    by_hand = [[LN2 / 2, -LN2 / 4, -LN2 / 4], [0.0, 0.0, 0.0], [LN2, LN2 / 2, -1.5 * LN2]]
    torch.testing.assert_close(gradient, torch.tensor(by_hand).double())


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_on_average_it_is_the_reverse_kl_and_its_gradient(temperature: float) -> None:
    """Every token of the vocabulary, weighted by how likely the student is to draw it."""
    hidden, target = normal(1, H, seed=1).requires_grad_(), normal(1, H, seed=2)
    one = replace(make_states((1,)), hidden_student=hidden, hidden_target=target, hidden_anchor=None, lesson_of=None)
    log_s = log_probs(hidden, one, temperature).detach()[0]
    every = replace(
        one,
        hidden_student=hidden.expand(V, H),
        hidden_target=target.expand(V, H),
        token_ids=torch.arange(V),
        token_weights=log_s.exp(),
        old_logprobs=log_s,
    )
    loss, _ = SampledToken(temperature)(every)
    expected = kl(log_probs(hidden, one, temperature), log_probs(target, one, temperature)).sum()
    torch.testing.assert_close(loss, expected)
    ours, reference = (torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, reference)


def test_the_sampled_token_of_another_model_is_read_by_its_head() -> None:
    states, wide, own = make_states((5,)), normal(5, H + 2, seed=3), normal(V, H + 2, seed=4)
    states = replace(states, hidden_target=wide, hidden_anchor=None, head_target=(own, None))
    _, extras = SampledToken()(states)
    chosen = range(5), states.token_ids.tolist()
    expected = (wide @ own.T).log_softmax(-1)[chosen] - log_probs(states.hidden_student, states)[chosen]
    torch.testing.assert_close(extras["advantage"], expected.detach())


def test_an_impossible_token_gives_no_infinity() -> None:
    states = of_logits(
        [[0.0, -5000.0]],
        hidden_target=torch.tensor([[-5000.0, 0.0]]).double(),
        token_ids=torch.tensor([0]),
        old_logprobs=torch.tensor([-5000.0]).double(),
    )
    assert SampledToken()(states)[0].isfinite()


def test_the_sampled_token_needs_the_samplers_probabilities() -> None:
    with pytest.raises(ValueError, match="SampledToken needs the target's states and the sampler's log-probs"):
        SampledToken()(of_logits([[1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"SampledToken takes ratios .* top_p 1 and top_k 0, got 1.0, 0.95 and 0"):
        SampledTokenOPSD(top_p=0.95)
    assert SampledTokenOPSD().uncorrected == ()


# ---- the contrast ----


def test_the_target_of_a_contrast_is_its_formula() -> None:
    """softmax((1 + a) log p+ - a log p-) from the probabilities of both views, normalised by hand."""
    states, right, wrong = make_states((6,)), normal(6, H, seed=10), normal(6, H, seed=11)
    steering = ContrastGuidance(0.5)
    anchor, direction = steering.coefficients(["plain", "success", "failure"])
    assert (anchor, direction) == ((0.0, 1.0, 0.0), (0.0, 1.0, -1.0))
    views = torch.stack([normal(6, H, seed=12), right, wrong])
    of_views = [torch.einsum("v,vth->th", torch.tensor(c).double(), views) for c in (anchor, direction)]
    target = Steered(anchor=of_views[0], direction=of_views[1], alpha=steering.alpha_at(7))
    p, q = (log_probs(h, states).exp() for h in (right, wrong))
    unscaled = p**1.5 / q**0.5
    torch.testing.assert_close(log_probs(target.states, states).exp(), unscaled / unscaled.sum(-1, keepdim=True))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_the_weight_of_a_contrast_is_its_formula(alpha: float, temperature: float) -> None:
    states, right, wrong = make_states((6,)), normal(6, H, seed=10), normal(6, H, seed=11)
    towards = states.towards(Steered(anchor=right, direction=right - wrong, alpha=alpha))
    k = kl(*(log_probs(h, states, temperature) for h in (right, wrong)))
    weights = ContrastWeight(tau=0.3, alpha=alpha)(towards, torch.zeros(6).double(), temperature)
    torch.testing.assert_close(weights, k / (k + 0.3), rtol=1e-9, atol=1e-12)


def test_views_that_agree_weigh_nothing() -> None:
    right = normal(3, H, seed=10)
    states = make_states((3,)).towards(Steered(anchor=right, direction=torch.zeros_like(right), alpha=0.5))
    assert ContrastWeight()(states, torch.zeros(3).double(), 1.0).tolist() == [0.0, 0.0, 0.0]


def test_opsd_ectr_is_the_mean_over_all_tokens() -> None:
    method, right, wrong = OPSD_ECTR(), normal(6, H, seed=10), normal(6, H, seed=11)
    states = replace(make_states((6,)), token_weights=torch.ones(6).double())
    towards = states.towards(Steered(anchor=right, direction=right - wrong, alpha=method.steering.alpha_at(0)))
    log_s, log_p, log_q = (log_probs(h, states) for h in (states.hidden_student, right, wrong))
    target = (1.5 * log_p - 0.5 * log_q).log_softmax(-1)
    k = kl(log_p, log_q)
    expected = (k / (k + 1) * (target.exp() * (target - log_s)).clamp(max=0.05).sum(-1)).sum()
    (objective,) = (term for _, term in method.objective.terms)
    torch.testing.assert_close(objective(towards)[0], expected, rtol=1e-9, atol=1e-12)


def test_weight_and_target_of_a_contrast_have_one_alpha() -> None:
    with pytest.raises(ValueError, match=r"ContrastGuidance\(alpha=0.5\), got ContrastGuidance\(alpha=1.0\)"):
        OPSD_ECTR(steering=ContrastGuidance(1.0))
    method = OPSD_ECTR(
        steering=ContrastGuidance(1.0), objective=Distillation(weighting=ContrastWeight(alpha=1.0)), top_k=0
    )
    assert method.name.startswith("OPSD_ECTR[steering.alpha=1, ")


# ---- what the teacher reads ----


def rollout(text: str, *, length: int, answer: str | None, correct: bool = False, cut: bool = False) -> Rollout:
    completion = Completion(
        token_ids=(3,) * length, logprobs=(-1.0,) * length, finish_reason="length" if cut else "stop"
    )
    status = "unparsable" if answer is None else "graded"
    return Rollout(completion=completion, text=text, verdict=Verdict(correct=correct, status=status, answer=answer))


def group_of(*rollouts: Rollout) -> RolloutGroup:
    problem = Problem(id="p", text="What is 2+2?", answer="4", solution="the reference")
    return RolloutGroup(problem=problem, prompt_ids=(5, 6), rollouts=rollouts, policy_version=0)


def taught(privilege: Privilege, group: RolloutGroup) -> list[tuple[str, list[str]]]:
    """Texts of the learned rollouts, each with what the teacher reads about it."""
    found = []
    for draft in privilege.drafts(group):
        assert draft.rollout is not None
        assert {text.role for text in draft.texts} == privilege.views.keys()
        found.append((draft.rollout.text, [text.text for text in draft.texts]))
    return found


def test_own_verdict_shows_the_rollout_and_its_verdict_and_nothing_else() -> None:
    right = rollout("two and two is 4", length=4, answer="4", correct=True)
    wrong = rollout("it is 5", length=3, answer="5")
    assert taught(OwnVerdict(right="Well done.", wrong="No."), group_of(right, wrong)) == [
        ("two and two is 4", ["two and two is 4\n\nWell done."]),
        ("it is 5", ["it is 5\n\nNo."]),
    ]
    cut = rollout("it is 4", length=3, answer="4", correct=True, cut=True)
    assert taught(OwnVerdict(wrong="No."), group_of(cut)) == [("it is 4", ["it is 4\n\nNo."])]


def test_own_verdict_has_a_role_and_a_wording_of_its_own(tiny_model: Path) -> None:
    (wording,) = OwnVerdict.views.values()
    problem = Problem(id="p", text="What is 2+2?", answer="4")
    for views, expected in (
        ({}, wording.template.replace("{problem}", "What is 2+2?").replace("{text}", "It is 5. No.")),
        ({"revision": "{text} | {problem}"}, "It is 5. No. | What is 2+2?"),
    ):
        encoder = PromptEncoder(Prompts(views=views), load_tokenizer(tiny_model))
        assert expected in encoder.decode(encoder.view(problem, wording, "It is 5. No."))


VOTES = (
    rollout("four", length=3, answer="4", correct=True),
    rollout("five, at length", length=9, answer="5"),
    rollout("five", length=2, answer="5"),
    rollout("five, cut", length=30, answer="5", cut=True),
    rollout("no answer", length=20, answer=None),
    rollout("five, soon", length=5, answer="5"),
    rollout("six", length=4, answer="6"),
    rollout("seven", length=6, answer="7"),
)


def test_the_consensus_by_hand() -> None:
    """Three of eight say 5, and one each 4, 6, 7: that 4 is right plays no part, nor do cut and empty rollouts."""
    three = 3 / 8
    assert taught(Consensus(three), group_of(*VOTES)) == [("seven", ["five, at length"])]
    assert taught(Consensus(three, reads="shortest"), group_of(*VOTES)) == [("seven", ["five"])]
    assert taught(Consensus(three, num_learned=2), group_of(*VOTES)) == [
        ("seven", ["five, at length"]),
        ("six", ["five, at length"]),
    ]
    assert [text for text, _ in taught(Consensus(three, num_learned=9), group_of(*VOTES))] == ["seven", "six", "four"]
    assert taught(Consensus(three + 0.01), group_of(*VOTES)) == []
    assert taught(Consensus(), group_of(*VOTES)) == []


def test_ties_and_groups_without_a_signal() -> None:
    four, five = rollout("four", length=3, answer="4", correct=True), rollout("five", length=2, answer="5")
    assert taught(Consensus(), group_of(four, five)) == [("five", ["four"])]
    assert taught(Consensus(), group_of(five, four)) == [("four", ["five"])]
    assert taught(Consensus(), group_of(four, four)) == []
    assert taught(Consensus(0.0), group_of(rollout("?", length=2, answer=None))) == []
    with pytest.raises(ValueError, match=r"threshold in \[0, 1\] and num_learned >= 1, got 1.5, 1"):
        Consensus(1.5)


def test_the_shortest_right_one_teaches_the_longest_wrong_one() -> None:
    """One right of four weighs 4 (1/4) (3/4) = 3/4, one of two weighs 1."""
    right = [rollout(f"right {n}", length=n, answer="4", correct=True) for n in (7, 3, 5)]
    wrong = [rollout(f"wrong {n}", length=n, answer="5") for n in (2, 9, 4)]
    several = group_of(*right, *wrong)
    assert taught(ShortestForLongest(), several) == [("wrong 9", ["right 3"])]

    def weights(group: RolloutGroup) -> list[float]:
        drafts: list[LessonDraft] = list(ShortestForLongest().drafts(group))
        return [draft.weight for draft in drafts]

    assert weights(several) == [1.0]
    assert weights(group_of(right[0], *wrong)) == [0.75]
    assert weights(group_of(right[0], right[1], right[2], wrong[0])) == [0.75]
    assert weights(group_of(*right)) == weights(group_of(*wrong)) == []


# ---- presets ----


def test_presets_are_what_their_docstrings_say() -> None:
    opsd = OPSD()
    for method in (HighEntropyOPSD(), U_OPSD()):
        assert isinstance(method, OPSD)
        assert (method.temperature, method.top_p, method.top_k) == (opsd.temperature, opsd.top_p, opsd.top_k)
    assert U_OPSD().objective == opsd.objective
    assert HighEntropyOPSD().objective == replace(opsd.objective, weighting=HighEntropy(0.2))  # pyright: ignore
    for method, divergence in ((TIP(), ReverseKL()), (SDZero(), ReverseKL()), (OPSD_ECTR(), ForwardKL())):
        assert isinstance(method.objective, Distillation)
        assert (method.objective.divergence, method.temperature) == (divergence, 1.0)
    factors, terms = zip(*SSOPD().objective.terms, strict=True)
    assert factors == (1.0, 0.5)
    assert terms == (GRPO(), Distillation(ForwardKL(), clip=0.05))
    assert SDZero().steering == TIP().steering == Unsteered()
    assert U_OPSD().selection == TIP().selection == AllTokens()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_of_two_lines_names_the_preset(name: str) -> None:
    lines = (EXPERIMENTS / f"{name}.yaml").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("# ")
    chosen = yaml.safe_load(lines[1])
    assert chosen == {"method": VARIANTS[name].__name__}
    assert getattr(ogls.methods, chosen["method"]) is VARIANTS[name]


# ---- two steps ----


def run(folder: Path, tmp_path: Path, method: Method, **changes: Any) -> tuple[SelfDistillation, list[float], Batch]:
    """Two optimiser steps in fp32 on scripted rollouts: the trained module, its losses and the first batch."""
    tokenizer = load_tokenizer(folder)

    def work(prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
        text = Chain.parse(tokenizer.decode(prompt)).work(rng, 0.25)
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    policy = Policy(str(folder), lora=Lora(rank=4, alpha=8), dtype="float32")
    data = RolloutDataModule(
        policy,
        method,
        train=Chains(size=30),
        val=Chains(size=6, split="heldout"),
        prompts=Prompts(system="", student="{problem}"),
        engine=ScriptedEngine(work),
        max_tokens=60,
        evaluation=Evaluation(samples=2, sampling=Sampling(max_tokens=60)),
        group_size=6,
        problems_per_step=4,
        steps_per_epoch=2,
        context_length=500,
    )
    model = SelfDistillation(policy, method, learning_rate=1e-3, **changes)
    torch.manual_seed(0)
    model.configure_model()
    losses: list[float] = []
    batches: list[Batch] = []
    log_dict, make_batch = model.log_dict, data.make_batch

    def keep(values: dict[str, float], **options: Any) -> None:
        losses.append(values["train/loss"])
        log_dict(values, **options)

    def keep_batch(step: int) -> Batch:
        batches.append(make_batch(step))
        return batches[-1]

    model.log_dict = keep  # pyright: ignore[reportAttributeAccessIssue]
    data.make_batch = keep_batch  # pyright: ignore[reportAttributeAccessIssue]
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        Trainer(
            max_epochs=1,
            accelerator="cpu",
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            default_root_dir=tmp_path,
            **silent,
        ).fit(model, data)
    finally:
        data.close()
    return model, losses, batches[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains(name: str, tiny_model: Path, tmp_path: Path) -> None:
    model, losses, batch = run(tiny_model, tmp_path, VARIANTS[name]())
    assert model.policy.version == len(losses) == 2
    assert all(math.isfinite(loss) and loss != 0.0 for loss in losses)
    assert any(lesson.views for lesson in batch.lessons)
    learned = [value for key, value in model.policy.trainable().items() if "lora_B" in key]
    assert any(value.abs().max() > 0 for value in learned)  # B begins at 0


@pytest.mark.parametrize("name", ["high_entropy", "tip", "opsd_ectr"])
def test_a_step_is_the_same_in_micro_batches_of_one_lesson(name: str, tiny_model: Path, tmp_path: Path) -> None:
    _, whole, batch = run(tiny_model, tmp_path, VARIANTS[name](), tokens_per_micro_batch=100_000)
    _, single, _ = run(tiny_model, tmp_path, VARIANTS[name](), tokens_per_micro_batch=1)
    assert len({len(lesson.token_ids) for lesson in batch.lessons}) > 1
    assert single == pytest.approx(whole, rel=2e-5)


def test_ssopd_learns_one_lesson_of_a_mixed_group_and_reinforces_all(tiny_model: Path, tmp_path: Path) -> None:
    _, _, batch = run(tiny_model, tmp_path, SSOPD())
    mixed = [group for group in batch.groups if group.mixed]
    assert mixed
    assert sum(bool(lesson.advantage) for lesson in batch.lessons) == sum(len(group.rollouts) for group in mixed)
    with_views = [lesson for lesson in batch.lessons if lesson.views]
    assert len(with_views) == len(mixed)
    for lesson, group in zip(with_views, mixed, strict=True):
        p = len(group.successes) / len(group.rollouts)
        assert len(lesson.token_ids) == max(len(r.completion.token_ids) for r in group.failures)
        assert lesson.token_weights == (4 * p * (1 - p),) * len(lesson.token_ids)
