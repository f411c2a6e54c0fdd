"""The profile over alpha on a vocabulary of three tokens, worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import alpha_profile
import numpy as np
import optuna
import pytest
import torch
from alpha_values import collect, fork
from states import Scored

from ogls.records import Lesson

HEAD = (torch.eye(3), None)
ALPHAS = [0.0, 0.5, 1.0, 2.0]


def scored(problem: str, ids: tuple[int, ...], weights: tuple[float, ...], direction: list[list[float]]) -> Scored:
    """Returns a lesson whose anchor and student are uniform."""
    zeros = torch.zeros(len(direction), 3)
    lesson = Lesson(problem_id=problem, prompt_ids=(0,), token_ids=ids, token_weights=weights)
    return Scored(lesson=lesson, student=zeros, anchor=zeros, direction=torch.tensor(direction), pools={})


def test_the_fork_is_where_the_nearest_right_text_goes_on_otherwise() -> None:
    assert fork([1, 2, 3, 4], [[1, 9], [1, 2, 5, 4], [1, 2, 6]]) == (2, {5, 6})
    assert fork([1, 2], [[1, 2, 3]]) == (2, set())  # the rollout ends before it leaves
    assert fork([1, 2], [[1, 2]]) == (2, set())  # it is the right text
    assert fork([1, 2], []) == (0, set())


def test_every_quantity_by_its_formula() -> None:
    one = scored("p", (2, 1), (1.0, 3.0), [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]])  # right is 2, 0: the fork is token 1
    sums = collect([one.lesson], [one], {"p": [(2, 0)]}, ALPHAS, HEAD)
    table = alpha_profile.tabulate(sums, ALPHAS)
    for row, alpha in enumerate(ALPHAS):
        p = np.exp([alpha, -alpha, 0.0])
        p /= p.sum()
        entropy = -(p * np.log(p)).sum()
        expected = {
            "kl_target_student": 3 / 4 * (math.log(3) - entropy),
            "kl_target_plain": 3 / 4 * (math.log(3) - entropy),
            "hoeffding_bound": 3 / 4 * alpha**2 * 2**2 / 8,
            "target_entropy": math.log(3) / 4 + 3 / 4 * entropy,
            "log_p_right": -math.log(3) / 4 + 3 / 4 * math.log(p[0]),
            "p_right": p[0],
            "p_rollout": p[1],
        }
        for name, value in expected.items():
            assert table[name][row] == pytest.approx(value, abs=1e-6), (name, alpha)
    assert (table["kl_target_plain"] <= table["hoeffding_bound"] + 1e-9).all()


def test_the_alpha_of_greatest_likelihood_and_the_one_recommended() -> None:
    # The direction raises token 0, which is right in q = 4 of 5 forks: d/dalpha = q - e^alpha / (e^alpha + 2) = 0
    # at e^alpha = 2 q / (1 - q) = 8.
    lessons = [scored(str(i), (2,), (1.0,), [[1.0, 0.0, 0.0]]) for i in range(5)]
    rights = {str(i): [(0,) if i else (1,)] for i in range(5)}
    alphas = np.linspace(0, 4, 401).tolist()
    sums = collect([one.lesson for one in lessons], lessons, rights, alphas, HEAD)
    advice = alpha_profile.advise(sums, alphas)
    assert advice.likeliest == pytest.approx(math.log(8), abs=0.005)
    assert advice.low < advice.likeliest < advice.high == 4.0  # in some draws the direction is right in all problems

    def loss(alpha: float) -> float:
        mean = [0.8 * a - math.log(math.exp(a) + 2) for a in (advice.likeliest, alpha)]
        return mean[0] - mean[1]

    # The difference in a draw with a share q of right directions is linear in q, whose variance is 0.8 * 0.2 / 5.
    error = math.sqrt(0.8 * 0.2 / 5) * (advice.likeliest - advice.recommended)
    assert 0 < advice.recommended < advice.likeliest
    assert loss(advice.recommended) == pytest.approx(error, rel=0.1)


def test_what_is_gained_beyond_a_hundredth_of_a_nat_is_not_worth_a_larger_alpha() -> None:
    # Always right: log p_right = -log(1 + 2 e^-alpha) rises for ever, the same in every draw of problems.
    lessons = [scored(str(i), (2,), (1.0,), [[1.0, 0.0, 0.0]]) for i in range(3)]
    alphas = np.linspace(0, 10, 1001).tolist()
    sums = collect([one.lesson for one in lessons], lessons, {str(i): [(0,)] for i in range(3)}, alphas, HEAD)
    advice = alpha_profile.advise(sums, alphas)
    assert advice.likeliest == 10.0
    assert advice.recommended == pytest.approx(math.log(2 / (math.exp(0.01) * (1 + 2 * math.exp(-10)) - 1)), abs=0.011)


def test_a_sweep_is_read_by_alpha_and_shown_beside_the_profile(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/optuna.db"
    study = optuna.create_study(storage=storage, study_name="alpha", direction="maximize")
    for alpha, value in [(0.5, 0.2), (1.0, 0.4), (1.0, 0.6), (2.0, 0.3)]:
        distributions = {"alpha": optuna.distributions.FloatDistribution(0, 4)}
        study.add_trial(optuna.trial.create_trial(params={"alpha": alpha}, distributions=distributions, value=value))
    points = alpha_profile.sweep_points(storage, "alpha")
    assert points.to_dict("list") == {"alpha": [0.5, 1.0, 2.0], "value": [0.2, 0.5, 0.3]}
    table = alpha_profile.pd.DataFrame({"alpha": [0.0, 4.0], "log_p_right": [0.0, 1.0]})
    advice = alpha_profile.Advice(likeliest=1.5, low=1.0, high=2.0, recommended=1.25)
    text = alpha_profile.report(table, advice, points)
    assert "likeliest at alpha 1.5 [1, 2]\nrecommended alpha: 1.25" in text
    assert "best alpha of the sweep: 1 (objective 0.5, 3 alphas)" in text
    assert "objective: 0.50" in text  # ranks 1, 3, 2 against 1, 2, 3
    with pytest.raises(ValueError, match="no study 'beta'"):
        alpha_profile.sweep_points(storage, "beta")


def test_without_a_right_token_there_is_no_profile() -> None:
    one = scored("p", (1,), (1.0,), [[1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="no token tells log_p_right"):
        alpha_profile.tabulate(collect([one.lesson], [one], {"p": []}, ALPHAS, HEAD), ALPHAS)
