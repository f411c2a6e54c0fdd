"""Curves by optimiser step from MLflow runs, one line per method: the figures of the papers.

    python analysis/curves.py accuracy --methods OGLS_SD OPSD            (OGLS-SD, figure 4)
    python analysis/curves.py ablation                                   (its ablations, and alpha = 0)
    python analysis/curves.py markers                                    (figure 5: words of reflection in the rollouts)
    python analysis/curves.py accuracy --metric train/kl_target_student --window 4

Runs that validate a subset amid training have its curve as --metric val_subset/avg_at_4, val/* before and after alone.
--methods takes whole names, or presets such as OPSD for all of their variants, OPSD[...], each with a line of its own.
Writes NAME.png and NAME.csv. Bands are 95 % over seeds (Student's t), or over problems where there is one seed and the
run logged an interval. `--published` adds what OGLS-SD reports for Qwen3-1.7B on AIME24, one seed.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.ticker import MaxNLocator
from mlflow import MlflowClient
from runs import of_preset, parser_of, read
from style import COLORS, GREY, MARKERS, panels, save

from ogls.system.statistics import mean_interval


@dataclass(frozen=True)
class Curves:
    """A figure shows a metric of some methods (of all where none is named), and published values every 25 steps."""

    metric: str
    label: str
    methods: tuple[str, ...] = ()
    published: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


TYPED = ("ogls_sd", "opsd", "positive_mean", "positive_only", "alpha_zero")
"""Labels of runs that were made before names were derived."""
FIGURES = {
    "accuracy": Curves(
        "val/avg_at_4",
        "avg@4 on held-out problems",
        published={
            "OPSD": (0.508, 0.508, 0.5625, 0.5625, 0.529, 0.508, 0.5125, 0.521, 0.517, 0.5125),
            "OGLS-SD": (0.508, 0.521, 0.521, 0.55, 0.529, 0.542, 0.5875, 0.6, 0.592, 0.592),
        },
    ),
    "ablation": Curves(
        "val/avg_at_4",
        "avg@4 on held-out problems",
        ("OGLS_SD", "OPSD", "PositiveMeanTeacher", "PositiveOnlySteering", *TYPED),
    ),
    "markers": Curves(
        "train/reflection_markers",
        "reflection markers per 100 words",
        published={
            "OPSD": (0.82, 0.74, 0.68, 0.65, 0.67, 0.71, 0.74, 0.75, 0.77),
            "OGLS-SD": (0.82, 0.78, 0.80, 0.87, 0.92, 0.95, 1.04, 1.14, 1.14),
        },
    ),
}
LEGEND_WIDTH, LEGEND_LINES = 32, 4
"""Characters of a label, and labels, that still fit a legend inside the axes."""


def half_width(values: Sequence[float]) -> float:
    """Returns half of the 95 % interval for the mean of independent values, t(n - 1) s / sqrt(n); nan for one value."""
    return mean_interval(values).high - mean_interval(values).mean if len(values) > 1 else math.nan


def by_step(history: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per method and step: runs, mean, low, high."""
    rows = []
    for (method, step), here in history.groupby(["method", "step"]):
        mean, half = float(here["value"].mean()), half_width(list(here["value"]))
        low, high = (mean - half, mean + half) if len(here) > 1 else (here["low"].iloc[0], here["high"].iloc[0])
        rows.append({"method": method, "step": step, "runs": len(here), "mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def smooth(history: pd.DataFrame, window: int) -> pd.DataFrame:
    """Returns each run's values as centred means over up to `window` of them, without the intervals of single ones."""
    if window == 1:
        return history
    history = history.sort_values(["run", "step"]).assign(low=math.nan, high=math.nan)
    history["value"] = history.groupby("run")["value"].transform(
        lambda values: values.rolling(window, center=True, min_periods=1).mean()
    )
    return history


def draw(
    history: pd.DataFrame,
    label: str,
    file: Path,
    published: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Writes the mean by step, one line per method, the best at the end first, with its band."""
    table = by_step(history)
    longest = max(map(len, table["method"]))
    width, columns = 90, 2 if longest <= LEGEND_WIDTH else 1
    lines = sum(1 + len(name) // width for name in table["method"].unique()) + len(published or {})
    below = longest > LEGEND_WIDTH or lines > LEGEND_LINES
    figure, (axes,) = panels(height=4.2 + (0.16 * lines / columns if below else 0.0))
    order = table.sort_values("step").groupby("method")["mean"].last().sort_values(ascending=False).index
    for number, method in enumerate(order):
        line, color = table[table["method"] == method], COLORS[number % len(COLORS)]
        seeds = history[history["method"] == method]["run"].nunique()
        name = textwrap.fill(f"{method}, {seeds} {'seed' if seeds == 1 else 'seeds'}", width, break_long_words=False)
        marker = MARKERS[number % len(MARKERS)]
        style = ("-", "--", ":")[number // len(COLORS) % 3]  # where there are more methods than colors
        axes.plot(line["step"], line["mean"], style, color=color, linewidth=2, marker=marker, markersize=4, label=name)
        axes.fill_between(line["step"], line["low"], line["high"], color=color, alpha=0.15, linewidth=0)
    for number, (name, values) in enumerate((published or {}).items()):
        steps, dashes = range(0, 25 * len(values), 25), ("--", ":")[number % 2]
        axes.plot(steps, values, dashes, color=GREY, linewidth=1.4, label=f"{name}, published (Qwen3-1.7B, AIME24)")
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    label = label.removeprefix("val/").replace("_at_", "@")
    axes.set_ylabel(label)
    if history["value"].min() >= 0:  # bands end where values can
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]), top=min(1.0, axes.get_ylim()[1]) if "@" in label else None)
    if below:  # derived names are as long as their changes are many
        figure.legend(loc="outside lower left", frameon=False, fontsize=8, ncols=columns)
    else:
        axes.legend(frameon=False)
    if table["low"].notna().any():
        axes.set_title("bands: 95 % over seeds, or over problems where there is one seed", fontsize=9, color=GREY)
    save(figure, file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("--metric", help="another metric than the figure's own")
    parser.add_argument("--methods", nargs="+", help="names or presets; default: those of the figure")
    parser.add_argument("--window", type=int, default=1, help="steps of a moving mean; default: %(default)s")
    parser.add_argument("--published", action="store_true", help="add the published curves, where there are some")
    parser.add_argument("--out", type=Path, metavar="NAME", help="default: the figure's name")
    options = parser.parse_args(arguments)
    if options.window < 1:
        parser.error(f"--window must be at least 1, got {options.window}")
    wanted, out = FIGURES[options.figure], options.out or Path(options.figure)
    metric, methods = options.metric or wanted.metric, options.methods or wanted.methods
    try:
        history = read(MlflowClient(options.tracking_uri), options.experiment, options.runs, options.filter, metric)
        if methods:
            history = history[[any(of_preset(name, method) for method in methods) for name in history["method"]]]
        if history.empty:
            raise ValueError(f"no run of the methods {', '.join(methods)} has the metric {metric!r}")
    except ValueError as error:
        parser.error(str(error))
    history = smooth(history, options.window)
    label = wanted.label if metric == wanted.metric else metric
    draw(history, label, out.with_suffix(".png"), wanted.published if options.published else None)
    by_step(history).to_csv(out.with_suffix(".csv"), index=False)
    print(by_step(history).to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(f"written: {out}.png, .csv")


if __name__ == "__main__":
    main()
