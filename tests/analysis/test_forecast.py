"""What the alpha profile foretells: the table by hand. Students, profiles and runs are the command's own."""

from __future__ import annotations

import forecast
import pandas as pd
import pytest
from stored_rows import Row, read_rows

RESULTS = forecast.PROJECT / "analysis" / "results"


def row(student: str, alpha: float, seed: int, accuracy: float) -> Row:
    recipe, _ = forecast.recipe_of(student, alpha)
    own = {"recipe": recipe, "method": "OGLS_SD", "settings": "", "digest": "", "seed": seed, "accuracy": accuracy}
    numbers = {"step": 20, "samples": 8, "passed": 0.9, "length": 20.0, "kl_to_base": 0.1, "sampled": 1, "learned": 1}
    texts = {"problems": "", "before": "4", "right": "4", "curve": f"0:0.5 20:{accuracy}"}
    return Row(**own, **numbers, **texts, seconds=60.0, threads=1)


def test_a_student_by_hand():
    # Best to worst by the profile: 1, 0.5, 2, 0.25, 4; by accuracy 1, 2, 0.5, 0.25, 4: two neighbours change places.
    alphas = list(forecast.ALPHAS)
    assert alphas == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0]
    told = {"likeliest": 1.1, "low": 0.5, "high": 1.5, "recommended": 0.6, "student": "own"}
    profile = pd.DataFrame({"alpha": alphas, "log_p_right": [0.0, -4.0, -2.0, -1.0, -3.0, -5.0], **told})
    after = [0.50, 0.62, 0.64, 0.70, 0.66, 0.51]
    seeds = ((0, 0.01), (1, -0.01))
    rows = [row("own", alpha, seed, value + d) for alpha, value in zip(alphas, after, strict=True) for seed, d in seeds]
    rows += [row("sft_3", 1.0, 0, 0.9)]  # has no profile, and not every alpha
    (line,) = forecast.summary(rows, profile).to_dict("records")
    assert line["rank correlation"] == pytest.approx(1 - 6 * 2 / (5 * 24)), "alpha 0 would be the profile's best"
    assert line["missed by the likeliest"] == 0, "1 is the trained alpha next to 1.1"
    assert line["missed by the recommended"] == pytest.approx(0.70 - 0.64), "0.5 is the trained alpha next to 0.6"
    assert (line["before"], line["alpha 1"], line["seeds"]) == (0.5, pytest.approx(0.70), 2)
    assert line["likeliest"] == "1.1 [0.5, 1.5]"
    assert forecast.summary(rows[:-3], profile).empty, "of alpha 4 there is no run"


def test_one_alpha_for_all_misses_the_mean_of_what_it_misses_of_each():
    columns = [f"alpha {alpha:g}" for alpha in forecast.ALPHAS]
    table = pd.DataFrame([[0.5, 0.6, 0.7, 0.8, 0.7, 0.6], [0.95, 0.9, 0.8, 0.7, 0.6, 0.5]], columns=columns)
    missed = forecast.missed_by_one(table)
    assert missed == pytest.approx({0.25: 0.125, 0.5: 0.125, 1.0: 0.125, 2.0: 0.225, 4.0: 0.325})


def test_the_stored_table_is_that_of_its_rows():
    rows, profiles = read_rows(RESULTS / "forecast_rows.csv"), pd.read_csv(RESULTS / "forecast_profile.csv")
    assert (RESULTS / "forecast.md").read_text() == forecast.markdown(forecast.summary(rows, profiles))
