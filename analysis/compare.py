"""Compare methods: MLflow runs -> a table (Markdown, CSV) and a figure of accuracy by step.

    python analysis/compare.py --experiment ogls --out results
    python analysis/compare.py --runs 3f2a... 91bc... --metric val/pass_at_4

Writes NAME.md, NAME.csv and NAME.png. Two intervals stand beside each mean, both 95 %, since they answer two questions:
over seeds (would another run of the method do the same? Student's t over the runs), and over problems (would other
held-out problems say the same? the mean of the intervals that each run logged as METRIC_low and METRIC_high).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from mlflow import MlflowClient
from scipy.stats import t as student_t

matplotlib.use("agg")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")  # Okabe and Ito


def read(client: MlflowClient, experiment: str, runs: Sequence[str], where: str, metric: str) -> pd.DataFrame:
    """One row a validation: method, seed, run, step, value, low, high (nan where no interval was logged).

    Raises:
        ValueError: no such experiment, or no run with this metric.
    """
    if runs:
        chosen = [client.get_run(run) for run in runs]
    else:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise ValueError(f"there is no experiment {experiment!r}")
        chosen = client.search_runs([found.experiment_id], where, max_results=1000)
    rows = []
    for run in chosen:
        named = {**run.data.tags, **run.data.params}
        values, lows, highs = (
            {m.step: m.value for m in client.get_metric_history(run.info.run_id, metric + end)}
            for end in ("", "_low", "_high")
        )
        for step, value in sorted(values.items()):
            rows.append(
                {
                    "method": named.get("method", "unnamed"),
                    "seed": int(named.get("seed", 0)),
                    "run": run.info.run_id,
                    "step": step,
                    "value": value,
                    "low": lows.get(step, math.nan),
                    "high": highs.get(step, math.nan),
                }
            )
    if not rows:
        raise ValueError(f"none of {len(chosen)} runs has the metric {metric!r}")
    return pd.DataFrame(rows)


def half_width(values: Sequence[float], level: float = 0.95) -> float:
    """Of the interval for the mean of n independent values: t(n - 1) s / sqrt(n); nan for a single one."""
    n = len(values)
    if n < 2:
        return math.nan
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return float(student_t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)


def summarise(history: pd.DataFrame) -> pd.DataFrame:
    """One row a method: before (first validation), after (last), their difference run by run, and the intervals."""
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
                "after ± seeds": half_width(after),
                "after ± problems": sum(float((e["high"] - e["low"]).iloc[1]) / 2 for e in ends) / len(ends),
                "change": sum(change) / len(change),
                "change ± seeds": half_width(change),
            }
        )
    return pd.DataFrame(rows).sort_values("after", ascending=False, ignore_index=True)


def markdown(table: pd.DataFrame) -> str:
    """The table as GitHub shows it; a dash where one run gives no interval."""
    cells = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    lines = [list(table.columns), ["---"] + ["---:"] * (len(table.columns) - 1), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"


def draw(history: pd.DataFrame, metric: str, file: Path) -> None:
    """Mean by step, one line a method, with the band over seeds; for a single run, the band over problems."""
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    order = summarise(history)["method"]
    for method, color in zip(order, COLORS * (1 + len(order) // len(COLORS)), strict=False):
        runs = history[history["method"] == method]
        number = runs["run"].nunique()
        by_step = runs.groupby("step")
        mean = by_step["value"].mean()
        if number > 1:
            width = by_step["value"].apply(lambda values: half_width(list(values)))
            low, high = mean - width, mean + width
        else:
            low, high = by_step["low"].mean(), by_step["high"].mean()
        label = f"{method} ({number} {'seed' if number == 1 else 'seeds'})"
        axes.plot(mean.index, mean, color=color, linewidth=2, marker="o", markersize=4, label=label)
        axes.fill_between(mean.index, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(metric.removeprefix("val/").replace("_at_", "@"))
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]), top=min(1.0, axes.get_ylim()[1]))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title("bands: 95 % over seeds, or over problems where there is one seed", fontsize=9, color="#555555")
    figure.savefig(file, dpi=200)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db", help="default: %(default)s")
    parser.add_argument("--experiment", default="ogls", help="default: %(default)s")
    parser.add_argument("--runs", nargs="+", default=[], metavar="ID", help="these runs instead of an experiment's")
    parser.add_argument("--filter", default="", help="as MLflow's search takes it: \"tags.method = 'opsd'\"")
    parser.add_argument("--metric", default="val/avg_at_4", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("compare"), metavar="NAME", help="default: %(default)s")
    options = parser.parse_args(arguments)
    client = MlflowClient(options.tracking_uri)
    try:
        history = read(client, options.experiment, options.runs, options.filter, options.metric)
    except ValueError as error:
        parser.error(str(error))
    table = summarise(history)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text(markdown(table))
    table.to_csv(options.out.with_suffix(".csv"), index=False)
    draw(history, options.metric, options.out.with_suffix(".png"))
    print(markdown(table))
    print(f"written: {options.out}.md, .csv, .png")


if __name__ == "__main__":
    main()
