"""How often intervals hold the truth, in the cells where that is hard; and the table that docs/statistics.md shows."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import coverage
import numpy as np
import pandas as pd
import pytest
from scipy.special import beta

ROOT = Path(__file__).resolve().parents[2]
HARD = [*product(["hardly any right: Beta(0.05, 3)", "nearly all right: Beta(3, 0.05)"], [1, 4, 16])]


@pytest.mark.parametrize(("shape", "k"), [*HARD, ("a tenth at 0.9, the rest at 0.02", 4)])
def test_hard_cells_hold_93_percent(shape: str, k: int) -> None:
    table = coverage.coverage(coverage.SHAPES[shape], k, (30, 128), repetitions=1000, seed=7)
    assert table["coverage"].min() >= 0.93
    assert table["t coverage"].min() < 0.93, "nothing was hard here"
    assert (table["width"] > 0).all()


@pytest.mark.parametrize("k", [1, 4, 16])
def test_the_truth_is_the_mean_of_a_beta_distribution(k: int) -> None:
    for a, b in ((0.05, 3.0), (0.5, 0.5), (3.0, 0.05)):
        found = coverage.truth(coverage.beta(a, b), k)
        assert found["avg"] == pytest.approx(a / (a + b))
        assert found["pass"] == pytest.approx(1 - beta(a, b + k) / beta(a, b))


def test_the_truth_by_hand() -> None:
    # At p = 0.5 two samples: both right 1/4, one right 1/2 (a tie of two with any wrong one), so maj@2 = 1/2.
    found = coverage.truth(coverage.two_points(0.5, 0.9, 0.0), 2)
    assert found == pytest.approx({"avg": 0.5, "pass": 0.75, "maj": 0.5})
    values = coverage.scores(np.array([[2, 2, 2, 0], [3, 2, 0, 0], [0, 1, 1, 1]]))
    assert values["maj"].tolist() == pytest.approx([1 / 3, 1, 0])


def test_the_documentation_shows_the_table_that_was_made() -> None:
    table = pd.read_csv(ROOT / "analysis" / "results" / "coverage.csv")
    assert coverage.summary(table) in (ROOT / "docs" / "statistics.md").read_text()
    assert coverage.whole(table) == (ROOT / "analysis" / "results" / "coverage.md").read_text()
    assert len(table) == 5 * 3 * 4 * 4
    assert table["coverage"].min() >= 0.93
    usual = table[table["t coverage"] >= 0.94]
    assert (usual["width"] / usual["t width"]).median() <= 1.05
