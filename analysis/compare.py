"""Compare methods: MLflow runs -> tables (Markdown, CSV) and a figure of accuracy by step.

    python analysis/compare.py --experiment ogls --out results
    python analysis/compare.py --runs 3f2a... 91bc... --metric val/pass_at_4 --against OPSD

Writes NAME.md, NAME.csv, NAME_paired.csv and NAME.png. Two intervals stand beside each mean, both 95 %, since they
answer two questions: over seeds (would another run of the method do the same? Student's t over the runs), and over
problems (would other held-out problems say the same? the mean of the intervals that each run logged as METRIC_low and
METRIC_high). Beside the mean stands the interquartile mean over runs.

The second table has differences of two methods, paired by seed, over the seeds that both have; by problem, over the
problems that both were judged on, each averaged over those seeds; and by both at once: would new seeds on new problems
say the same? The last is what to judge by, with "p, Holm", which is corrected for the number of comparisons in the
table. "P(better)" is the probability that a run of the one method is better than a run of the other one, and the last
column has the seeds with which a true difference of --wanted would be found in 80 % of all cases; docs/statistics.md
says how.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from curves import draw, half_width
from mlflow import MlflowClient
from runs import accuracy_by_problem, comparison, of_preset, parser_of, read
from seeds import difference, holm, interquartile_mean, probability_of_improvement, seeds_needed

from ogls.system.statistics import paired_difference

Problems = Mapping[str, Mapping[str, float]]
"""By run, the accuracy of each problem at its last validation."""


def summarise(history: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per method: before (first validation), after (last), their difference by run, and intervals."""
    rows = []
    for method, runs in history.groupby("method"):
        ends = [run.sort_values("step").iloc[[0, -1]] for _, run in runs.groupby("run")]
        before = [float(end["value"].iloc[0]) for end in ends]
        after = [float(end["value"].iloc[1]) for end in ends]
        change = [b - a for a, b in zip(before, after, strict=True)]
        rows.append(
            {
                "method": method,
                "runs": len(ends),
                "steps": int(max(end["step"].iloc[1] for end in ends)),
                "before": sum(before) / len(before),
                "after": sum(after) / len(after),
                "IQM": interquartile_mean(np.array([after])),
                "after ± seeds": half_width(after),
                "after ± problems": sum(float((e["high"] - e["low"]).iloc[1]) / 2 for e in ends) / len(ends),
                "change": sum(change) / len(change),
                "change ± seeds": half_width(change),
            }
        )
    return pd.DataFrame(rows).sort_values("after", ascending=False, ignore_index=True)


def last_rows(history: pd.DataFrame) -> pd.DataFrame:
    """Returns the last validation of each run."""
    return history.sort_values("step").groupby("run", as_index=False).last()


def compare_pairs(
    history: pd.DataFrame,
    problems: Problems,
    against: str | None = None,
    wanted: float = 0.02,
    sets: Sequence[pd.DataFrame] = (),
) -> pd.DataFrame:
    """Returns one row per pair of methods: the difference in the metric over common seeds, in accuracy over common
    problems, and in accuracy over both at once.

    The first two are Student's paired t-tests (two-sided), of seeds and of problems; the third is `seeds.difference`.
    "p, Holm" is its p, corrected for the number of pairs. Where a method has several runs of one seed, they are
    averaged.

    Args:
        history: values as `read` gives them
        problems: accuracy of each problem at the end, by run
        against: method that all others are compared with, by its name or, where that is clear, by its preset; None
            compares every pair, the better one first
        wanted: true difference for which the last column says the number of seeds
        sets: values of each evaluation set, over which the probability of improvement is averaged; none takes `history`

    Raises:
        ValueError: no method is called `against`, or several are variants of it.
    """
    last = last_rows(history)
    order = list(last.groupby("method")["value"].mean().sort_values(ascending=False).index)
    if against is not None and against not in order:
        variants = [method for method in order if of_preset(method, against)]
        if not variants:
            raise ValueError(f"there is no method {against!r}; got {', '.join(order)}")
        if len(variants) > 1:
            raise ValueError(f"{against!r} is the preset of several methods; say which: {', '.join(variants)}")
        (against,) = variants
    pairs = combinations(order, 2) if against is None else ((method, against) for method in order if method != against)
    scores = {method: scores_of(method, sets or [history]) for method in order}
    rows = []
    for one, other in pairs:
        values = [last[last["method"] == method].groupby("seed")["value"].mean() for method in (one, other)]
        seeds = sorted(set(values[0].index) & set(values[1].index))
        row: dict[str, object] = {"method": one, "against": other, "seeds": len(seeds)}
        row |= _paired("seeds", *({str(seed): float(value[seed]) for seed in seeds} for value in values))
        tables = [
            _by_seed_and_problem(last[(last["method"] == m) & last["seed"].isin(seeds)], problems) for m in (one, other)
        ]
        common = tables[0].columns.intersection(tables[1].columns)
        row["problems"] = len(common)
        row |= _paired("problems", *({str(p): float(mean) for p, mean in t[common].mean().items()} for t in tables))
        differences = (tables[0][common] - tables[1][common]).to_numpy()
        both = difference(differences)
        row |= {"difference, both": both.mean, "± both": both.half, "p, both": both.p_value, "p, Holm": math.nan}
        row["P(better)"] = probability_of_improvement(scores[one], scores[other])
        judged = min(differences.shape) >= 2
        needed = seeds_needed(differences, wanted) if judged else math.nan
        row[f"seeds for {wanted:g}"] = "more problems" if needed is None else needed
        rows.append(row)
    for row, corrected in zip(rows, holm([row["p, both"] for row in rows]), strict=True):
        row["p, Holm"] = corrected
    return pd.DataFrame(rows)


def scores_of(method: str, sets: Sequence[pd.DataFrame]) -> np.ndarray:
    """Returns what a method's runs had at their last validations: an array with the axes [runs, sets]."""
    lasts = [last_rows(one) for one in sets]
    return np.stack([last[last["method"] == method].sort_values("run")["value"].to_numpy() for last in lasts], axis=1)


def _paired(over: str, one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    if not one:
        return {f"difference, {over}": math.nan, f"± {over}": math.nan, f"p, {over}": math.nan}
    found = paired_difference(before=other, after=one)
    alone = found.num_problems == 1
    half, p_value = (math.nan, math.nan) if alone else (found.high - found.mean, found.p_value)
    return {f"difference, {over}": found.mean, f"± {over}": half, f"p, {over}": p_value}


def _by_seed_and_problem(runs: pd.DataFrame, problems: Problems) -> pd.DataFrame:
    """Returns accuracies, one row per seed and one column per problem that all of these runs were judged on."""
    by_seed = {
        seed: pd.DataFrame([problems.get(run, {}) for run in of_seed["run"]]).mean()
        for seed, of_seed in runs.groupby("seed")
    }
    return pd.DataFrame(by_seed).dropna().T.sort_index()


def markdown(table: pd.DataFrame) -> str:
    """Returns the table as GitHub shows it; a dash where one run gives no interval."""
    cells = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    lines = [list(table.columns), ["---"] + ["---:"] * (len(table.columns) - 1), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--metric", default="val/avg_at_4", help="default: %(default)s")
    parser.add_argument("--against", metavar="METHOD", help="name or preset to compare with; default: all pairs")
    parser.add_argument("--wanted", type=float, default=0.02, help="difference to find by seeds; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs") / "compare", metavar="NAME", help="%(default)s")
    options = parser.parse_args(arguments)
    client = MlflowClient(options.tracking_uri)
    try:
        history = read(client, options.experiment, options.runs, options.filter, options.metric)
        last = last_rows(history)
        problems = {
            run: accuracy_by_problem(client, run, int(step))
            for run, step in zip(last["run"], last["step"], strict=True)
        }
        pairs = compare_pairs(history, problems, options.against, options.wanted)
    except ValueError as error:
        parser.error(str(error))
    table = summarise(history)
    text = markdown(table) + (f"\n{markdown(pairs)}" if len(pairs) else "")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    table.to_csv(options.out.with_suffix(".csv"), index=False)
    pairs.to_csv(options.out.with_name(f"{options.out.name}_paired.csv"), index=False)
    draw(history, options.metric, options.out.with_suffix(".png"))
    print(text)
    print(f"written: {options.out}.md, .csv, .png and {options.out}_paired.csv")
    print(f"in MLflow: {comparison(client, options.tracking_uri, list(last['run']))}")


if __name__ == "__main__":
    main()
