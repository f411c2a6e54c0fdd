"""Differences over seeds and problems: against worked cases, known special cases, and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import seeds
from scipy import stats


def drawn(rng: np.random.Generator, shape: tuple[int, int], a: float, b: float, e: float) -> np.ndarray:
    return a * rng.normal(size=(shape[0], 1)) + b * rng.normal(size=shape[1]) + e * rng.normal(size=shape)


def test_components_by_hand() -> None:
    # Means of seeds 1, 3, 5; of problems 2, 4; all of it additive, so that nothing is left.
    table = np.array([[0.0, 2.0], [2.0, 4.0], [4.0, 6.0]])
    found = seeds.Components.of(table)
    assert (found.of_seeds, found.of_problems) == pytest.approx((2 * 4.0, 3 * 2.0))
    assert found.of_rest == pytest.approx(0.0, abs=1e-12)
    error, free = found.error  # (8 + 6) / 6; 14^2 / (8^2 / 2 + 6^2 / 1)
    assert (error, free) == pytest.approx((math.sqrt(14 / 6), 196 / 68))
    assert seeds.difference(table).mean == 3.0
    # Means of seeds 1/2, 5/2, 5; of problems 2, 10/3; squares of what is left sum to 7/3.
    found = seeds.Components.of(np.array([[0.0, 1.0], [1.0, 4.0], [5.0, 5.0]]))
    assert (found.of_seeds, found.of_problems, found.of_rest) == pytest.approx((61 / 6, 8 / 3, 7 / 6))
    both, spread = 35 / 3, (61 / 6) ** 2 / 2 + (8 / 3) ** 2 + (7 / 6) ** 2 / 2
    assert found.error == pytest.approx((math.sqrt(both / 6), both**2 / spread))


def test_where_seeds_alone_vary_it_is_the_t_test_over_seeds() -> None:
    of_seed = np.array([0.1, 0.3, 0.2, 0.25])
    found = seeds.difference(np.repeat(of_seed[:, None], 50, axis=1))
    expected = stats.ttest_1samp(of_seed, 0.0)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.half == pytest.approx(expected.confidence_interval().high - of_seed.mean())
    turned = seeds.difference(np.repeat(of_seed[None], 50, axis=0))  # problems alone
    assert (turned.half, turned.p_value) == pytest.approx((found.half, found.p_value))


@pytest.mark.parametrize(("a", "b", "e"), [(0.05, 0.05, 0.25), (0.0, 0.2, 0.2), (0.02, 0.1, 0.25)])
def test_the_interval_covers_new_seeds_on_new_problems(a: float, b: float, e: float) -> None:
    rng = np.random.default_rng(0)
    tables = [drawn(rng, (5, 60), a, b, e) for _ in range(600)]
    found = [seeds.difference(table) for table in tables]
    covered = np.mean([abs(one.mean) <= one.half for one in found])
    assert 0.93 <= covered <= 0.99
    assert np.mean([one.p_value < 0.05 for one in found]) == pytest.approx(1 - covered)
    if b == 0.2:  # what is judged over seeds of the same problems alone is far too sure
        over_seeds = [stats.ttest_1samp(table.mean(1), 0.0).pvalue for table in tables]
        assert np.mean([p < 0.05 for p in over_seeds]) > 0.2


def test_too_few_to_judge() -> None:
    two = seeds.difference(np.array([[0.1, 0.2, 0.3], [0.1, 0.0, 0.1]]))
    assert two.mean == pytest.approx(0.8 / 6)
    assert math.isnan(two.p_value)
    assert seeds.difference(np.full((3, 4), 0.5)).p_value == 0.0
    assert seeds.difference(np.zeros((3, 4))).p_value == 1.0


def test_the_seeds_that_are_asked_for_find_the_difference() -> None:
    rng = np.random.default_rng(1)
    wanted, spread = 0.05, {"a": 0.04, "b": 0.02, "e": 0.1}
    asked = seeds.seeds_needed(drawn(rng, (200, 400), **spread), wanted)
    # Over seeds alone: 0.05 / 0.04 is an effect of 1.25 standard deviations, for which a t-test needs 8 seeds.
    assert asked in (7, 8, 9)
    found = [seeds.difference(wanted + drawn(rng, (asked, 400), **spread)).p_value < 0.05 for _ in range(300)]
    assert 0.7 <= np.mean(found) <= 0.9
    assert seeds.seeds_needed(drawn(rng, (20, 20), 0.0, 0.5, 0.1), 0.01) is None, "20 problems never show it"


def test_holm_by_hand() -> None:
    nan = math.nan
    assert seeds.holm([0.01, 0.04, 0.03, nan]) == pytest.approx([0.03, 0.06, 0.06, nan], nan_ok=True)
    assert seeds.holm([0.9, 0.8]) == [1.0, 1.0]
    assert seeds.holm([]) == []


def test_interquartile_mean_and_probability_of_improvement_by_hand() -> None:
    assert seeds.interquartile_mean(np.array([[0.0], [0.4], [0.6], [1.0]])) == pytest.approx(0.5)
    assert seeds.interquartile_mean(np.arange(8.0).reshape(2, 4)) == pytest.approx((2 + 3 + 4 + 5) / 4)
    ours, theirs = np.array([[0.5, 0.2], [0.7, 0.2]]), np.array([[0.4, 0.2], [0.6, 0.9]])
    # Set one: 0.5 > 0.4, 0.7 > 0.4, 0.7 > 0.6 of 4 pairs; set two: two ties and no win.
    assert seeds.probability_of_improvement(ours, theirs) == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert seeds.probability_of_improvement(ours, ours) == pytest.approx(0.5)
