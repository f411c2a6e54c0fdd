"""Rows of planted styles: which are made, and what a table says of them. Nothing is trained but in the slow test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
from scipy.stats import spearmanr

RESULTS = planted.PROJECT / "analysis" / "results"


def row(arm: str, share: float, seed: int, bias: float, accuracy: float) -> dict[str, Any]:
    made = {"method": arm, "share": share, "seed": seed, "digest": planted.ARMS[arm].recipe(share).digest}
    made |= {"bias": bias, "removed": np.nan, "shift": 0.5}
    made |= {"accuracy_before": 0.45, "length_before": 20.0, "terse_before": 0.2, "name": f"{arm}[{share:g}]"}
    return made | {"steps": 20, "accuracy": accuracy, "length": 18.0, "terse": 0.3}


ROWS = [
    *(row("OPSD", 0.0, seed, 0.1, 0.60 + 0.02 * seed) for seed in (0, 1)),
    *(row("OPSD", 1.0, seed, 0.7, 0.40 + 0.02 * seed) for seed in (0, 1)),
    *(row("OGLS_SD", 0.0, seed, -0.1, 0.60) for seed in (0, 1)),
    *(row("OGLS_SD", 0.5, seed, -0.1, 0.58) for seed in (0, 1)),
    *(row("OGLS_SD", 1.0, seed, 0.0, 0.56) for seed in (0, 1)),
]


def test_losses_are_against_the_same_method_and_seed_with_nothing_planted():
    cells = planted.cells_of(pd.DataFrame(ROWS)).set_index(["method", "share"])
    assert cells.loc[("OPSD", 1.0), ["excess", "loss", "change", "seeds"]].tolist() == pytest.approx(
        [0.6, 0.2, -0.04, 2]
    )
    found = planted.forecasts(cells.reset_index())
    value, low, high, count = found["bias that the style adds, and loss of accuracy by it (share > 0)"]
    assert (value, count) == (pytest.approx(1.0), 3)  # 0, 0.1, 0.6 with 0.02, 0.04, 0.2
    assert low <= value <= high
    lost = pd.DataFrame([r for r in ROWS if not (r["method"] == "OPSD" and r["share"] == 0)])
    assert planted.forecasts(planted.cells_of(lost))[next(iter(found))][3] == 2, "without its own zero there is no loss"


def test_a_cell_with_nothing_planted_counts_once():
    alone = "OGLS_SD, right views alone"
    rows = [*ROWS, *(r | {"method": alone} for r in ROWS if r["method"] == "OGLS_SD")]
    counts = [count for *_, count in planted.forecasts(planted.cells_of(pd.DataFrame(rows))).values()]
    assert counts == [5, 7, 7], "of 8 cells"


def test_a_rank_correlation_has_the_interval_of_its_pairs():
    x = np.arange(12.0)
    y = np.random.default_rng(1).normal(size=12) + x / 6
    value, low, high = planted.rank_correlation(x, y)
    assert value == pytest.approx(spearmanr(x, y).statistic)
    assert -1 <= low < value < high <= 1
    assert planted.rank_correlation(x, x**3) == pytest.approx((1.0, 1.0, 1.0))
    assert np.isnan(planted.rank_correlation(x, 0 * x)).all()
    assert np.isnan(planted.rank_correlation(x[:2], y[:2])).all()


def test_a_table_says_what_the_rows_say():
    lines = planted.markdown(pd.DataFrame(ROWS)).splitlines()
    # Two seeds, 0.60 and 0.62: half of the interval is t(0.975, 1) 0.01 = 0.127.
    assert lines[2] == "| OPSD[...] | 0 | 2 | +0.100 |  | 0.300 ± 0.000 | 18.0 ± 0.0 | 0.610 ± 0.127 | 0.160 ± 0.127 |"
    assert "Before training: accuracy 0.450, length 20.0, without work 0.200. Steps: 20." in "\n".join(lines)
    assert lines[-2:] == ["- OPSD[...]: `OPSD[1]`", "- OGLS_SD[...]: `OGLS_SD[1]`"]
    assert planted.label("OGLS_SD, right views alone") == "OGLS_SD[...], right views alone"


def test_only_missing_rows_are_made_and_each_is_stored_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    made: list[tuple[str, float, int]] = []
    ends: list[BaseException | None] = [
        None,
        RuntimeError("failed"),
        None,
        KeyboardInterrupt(),
        None,
        RuntimeError("x"),
    ]
    start = {key: value for key, value in ROWS[0].items() if key.endswith("_before")}

    def make(arm: str, share: float, seed: int, options: Any, before: dict[str, float] | None) -> dict[str, Any]:
        assert before == (start if made else None), "measured once for a seed"
        made.append((arm, share, seed))
        end = ends[len(made) - 1]
        if end is not None:
            raise end
        return row(arm, share, seed, 0.1, 0.5)

    monkeypatch.setattr(planted, "make_row", make)
    command = ["--seeds", "1", "--arms", "OPSD", "OGLS_SD", "--shares", "1", "0", "--out", str(tmp_path / "bias")]
    with pytest.raises(KeyboardInterrupt):
        planted.main(command)
    with pytest.raises(SystemExit, match="1 rows failed; the same command makes them again"):
        planted.main(command)
    assert "2 rows to make, 2 are there" in capsys.readouterr().out
    assert made[:4] == [("OPSD", 1.0, 0), ("OGLS_SD", 1.0, 0), ("OPSD", 0.0, 0), ("OGLS_SD", 0.0, 0)]
    assert made[4:] == [("OGLS_SD", 1.0, 0), ("OGLS_SD", 0.0, 0)]
    rows = pd.read_csv(tmp_path / "bias_rows.csv")
    assert list(zip(rows["method"], rows["share"], strict=True)) == [("OPSD", 0.0), ("OPSD", 1.0), ("OGLS_SD", 1.0)]
    assert (tmp_path / "bias.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_changed_configurations_are_stale_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "bias_rows.csv"
    changed = row("OPSD", 1.0, 0, 0.7, 0.4) | {"digest": "of another", "accuracy": 0.9}
    pd.DataFrame([ROWS[0], changed]).to_csv(file, index=False)
    assert [planted.sound(r) for r in planted.read_rows(file)] == [True, False]
    monkeypatch.setattr(planted, "make_row", lambda arm, share, seed, *_: row(arm, share, seed, 0.1, 0.5))
    planted.main(["--seeds", "1", "--arms", "OPSD", "--shares", "0", "1", "--out", str(tmp_path / "bias")])
    assert "1 rows are stale, since configurations have changed since they were made: OPSD" in capsys.readouterr().out
    assert pd.read_csv(file)["accuracy"].tolist() == [ROWS[0]["accuracy"], 0.5]
    assert not planted.sound(planted.read_rows(file)[0], ["--model.learning_rate", "1e-5"]), "not of other settings"


def test_answers_are_what_the_rows_tell(tmp_path: Path):
    file = tmp_path / "bias_rows.csv"
    rows = [r | {"removed": 0.9, "terse": 0.3 + 0.1 * r["share"]} for r in ROWS]
    pd.DataFrame(rows).to_csv(file, index=False)
    assert "+0.100, no interval: 2 seeds" in planted.answers(tmp_path / "bias").values()
    pd.DataFrame([*rows, *(r | {"seed": 2} for r in rows if r["seed"] == 0)]).to_csv(file, index=False)
    told = planted.answers(tmp_path / "bias")
    assert told["A style planted in the texts in view: more answers in that style under OPSD[...]"].startswith(
        "**+0.100 ±"
    )
    assert told["What share of such views' shift does the contrast remove?"].startswith("**+0.900 ± 0.000** (3 seeds)")
    pd.DataFrame([r for r in ROWS if r["method"] == "OPSD" and r["share"] == 0]).to_csv(file, index=False)
    assert not any("style" in question and "under" in question for question in planted.answers(tmp_path / "bias"))
    assert planted.answers(tmp_path / "absent") == {}


def test_without_rows_there_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        planted.main(["--seeds", "0", "--out", str(tmp_path / "bias")])
    assert stopped.value.code == 2
    assert "there are no rows yet; --seeds 1 makes some" in capsys.readouterr().err


def test_the_stored_table_is_that_of_the_stored_rows():
    rows = pd.read_csv(RESULTS / "bias_rows.csv")
    assert (RESULTS / "bias.md").read_text(encoding="utf-8") == planted.markdown(rows)
    assert not rows.duplicated(["method", "share", "seed"]).any()
    assert set(rows["method"]) <= planted.ARMS.keys()
    assert all(map(planted.sound, rows.to_dict("records"))), "of configurations as they are"


@pytest.mark.slow
def test_a_row_from_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run.py"])
    small = ["--data.val.size", "8", "--data.problems_per_step", "4", "--data.steps_per_epoch", "1"]
    small += ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    command = ["--seeds", "1", "--arms", "OGLS_SD", "--shares", "1", "--problems", "8"]
    command += ["--out", "found/bias", "--args", *small]
    planted.main(command)
    (made,) = pd.read_csv("found/bias_rows.csv").to_dict("records")
    assert made["name"].startswith("OGLS_SD[privilege=AnswersAlone(privilege=PeerOutcomes(max_peers=1), share=1), ")
    assert made["steps"] == 1
    assert 0 <= made["terse"] <= 1
    assert made["removed"] > 0.5
