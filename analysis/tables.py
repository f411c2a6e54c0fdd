"""Tables are made of rows alone: means with intervals, paired tests, curves."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from compare import compare_pairs, last_rows, markdown, scores_of
from curves import draw, half_width
from seeds import interquartile_mean
from stored_rows import Row, called, history_of, of_sets

COARSE = ("length", "sampled, k", "learned, k", "seconds")
"""Measures with one decimal."""


def tabulate(rows: list[Row]) -> pd.DataFrame:
    """Returns one row per method, the most accurate first: seeds, steps, and of each measure mean and half interval.

    After the accuracy comes its interquartile mean over runs and sets. What no run measured is left out.
    """
    names, sets, history = called(rows), of_sets(rows), history_of(rows)
    k = rows[0].samples
    values = pd.DataFrame(
        [
            {
                "method": names[row.recipe],
                "before": row.accuracy_before,
                "accuracy": row.accuracy,
                f"pass@{k}": row.passed,
                "length": row.length,
                "KL to base": row.kl_to_base,
                **{
                    f"accuracy, {name}": float(one.loc[one["run"] == row.run, "value"].iloc[0])
                    for name, one in sets.items()
                },
                "sampled, k": row.sampled / 1000,
                "learned, k": row.learned / 1000,
                "seconds": row.seconds,
            }
            for row in rows
        ]
    ).groupby("method")
    steps = pd.Series({names[row.recipe]: row.step for row in rows})
    columns: dict[str, pd.Series] = {"seeds": values.size(), "steps": steps}
    for measure in values.obj.columns.drop("method"):
        if values.obj[measure].notna().any():
            columns[measure] = values[measure].mean()
            columns[f"{measure} ±"] = values[measure].apply(lambda seeds: half_width(list(seeds)))
        if measure == "accuracy":
            each = list(sets.values()) or [last_rows(history)]
            columns["IQM"] = pd.Series({name: interquartile_mean(scores_of(name, each)) for name in values.groups})
    return pd.DataFrame(columns).sort_values("accuracy", ascending=False).reset_index(names="method")


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of `tabulate` for the eye: mean and interval in one cell."""
    cells = {}
    for name in [name for name in table.columns if not name.endswith(" ±")]:
        halves = table.get(f"{name} ±", pd.Series([float("nan")] * len(table)))
        digits = 1 if name in COARSE else 3
        cells[name] = [
            mean
            if not isinstance(mean, float)
            else f"{mean:.{digits}f}"
            if pd.isna(half)
            else f"{mean:.{digits}f} ± {half:.{digits}f}"
            for mean, half in zip(table[name], halves, strict=True)
        ]
    return pd.DataFrame(cells)


def settings(rows: list[Row]) -> str:
    """Returns what each method's runs were told beside their configurations, as a list in Markdown."""
    names = called(rows)
    told = {names[row.recipe]: row.settings for row in rows if row.settings}
    return "".join(f"- {name}: `{words}`\n" for name, words in sorted(told.items()))


def write(rows: list[Row], against: str | None, out: Path, wanted: float, heading: str = "") -> str:
    """Writes all files about some runs, and returns the text of NAME.md.

    Args:
        rows: rows of the runs
        against: recipe that all others are compared with; None, or one without rows, compares every pair
        out: path of the files without their endings
        wanted: true difference for which the number of seeds is told
        heading: what the text begins with
    """
    if len(ks := {row.samples for row in rows}) != 1:
        raise ValueError(f"expected runs with the same number of samples a held-out problem, got {sorted(ks)}")
    names, history = called(rows), history_of(rows)
    problems = {row.run: row.accuracies(row.right) for row in rows}
    pairs = compare_pairs(history, problems, names.get(against or ""), wanted, list(of_sets(rows).values()))
    table = tabulate(rows)
    parts = [heading, markdown(shown(table)), markdown(pairs) if len(pairs) else "", settings(rows)]
    text = "\n".join(part for part in parts if part)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    table.to_csv(out.with_suffix(".csv"), index=False)
    pairs.to_csv(out.with_name(f"{out.name}_paired.csv"), index=False)
    draw(history, "accuracy, held-out problems", out.with_name(f"{out.name}_accuracy.png"))
    return text
