"""Points of a surface by hand: what is a line, what is a value, whose interval is drawn."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from stored_rows import Row
from surface import draw, table_of

from ogls.system.statistics import share_interval


def row(recipe: str, seed: int, accuracy: float) -> Row:
    own = {"recipe": recipe, "method": "OGLS_SD", "settings": "", "digest": "", "seed": seed, "accuracy": accuracy}
    numbers = {"step": 20, "samples": 2, "passed": 0.9, "length": 20.0, "kl_to_base": 0.1, "sampled": 1, "learned": 1}
    return Row(
        **own, **numbers, problems="p", before="11", right="12", curve=f"0:0.5 20:{accuracy}", seconds=1.0, threads=1
    )


ROWS = [
    row("ogls_sd --method.steering.alpha 1", 0, 0.75),
    *(
        row("ogls_sd --method.objective.clip 0.05 --method.steering.alpha 4", seed, 0.6 + 0.02 * seed)
        for seed in (0, 1)
    ),
    row("ogls_sd --method.objective.clip 0.05 --method.steering.alpha 0.5", 0, 0.75),
]


def test_points_are_by_the_other_settings_and_the_value():
    table = table_of(ROWS, "method.steering.alpha")
    assert table[["others", "value", "seeds"]].values.tolist() == [
        ["", 1.0, 1],
        ["clip 0.05", 0.5, 1],
        ["clip 0.05", 4.0, 2],
    ]
    assert table["mean"].tolist() == pytest.approx([0.75, 0.75, 0.61])
    # 0.60 and 0.62: half of the interval is t(0.975, 1) 0.01 = 0.127; of one seed it is over problems, 1/2 and 2/2.
    assert (table["high"] - table["mean"]).iloc[2] == pytest.approx(0.127, abs=1e-3)
    assert tuple(table[["mean", "low", "high"]].iloc[0]) == pytest.approx(share_interval([0.5, 1.0]))


def test_the_figure_is_drawn_with_what_was_foretold(tmp_path: Path):
    alphas = [0.0, 0.5, 1.0, 4.0]
    profile = pd.DataFrame({"alpha": alphas, "log_p_right": -1.0, "log_p_right_low": -2.0, "log_p_right_high": 0.0})
    draw(ROWS, "method.steering.alpha", tmp_path / "two.png", profile)
    draw(ROWS, "method.steering.alpha", tmp_path / "one.png")
    two, one = ((tmp_path / name).read_bytes() for name in ("two.png", "one.png"))
    assert two.startswith(b"\x89PNG")
    height = lambda file: int.from_bytes(file[20:24], "big")  # noqa: E731 - of the PNG's header
    assert height(two) > 1.4 * height(one), "a panel more"
