"""A surface is accuracy by one setting, a line for each combination of the others: NAME_by_setting.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from curves import half_width
from matplotlib.axes import Axes
from recipes import arguments_of
from stored_rows import Row
from style import COLORS, GREY, MARKERS, panels, save

from ogls.system.statistics import share_interval


def table_of(rows: Sequence[Row], axis: str) -> pd.DataFrame:
    """Returns a line for each point: the other settings in words, value, mean accuracy, its interval, seeds.

    The interval is over seeds (95 %, Student's t); where there is one seed, over its problems.

    Args:
        rows: rows of recipes that are told apart by their arguments
        axis: option of the command line whose value is the point's, without dashes
    """
    points: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        words = arguments_of(row.recipe)
        options = dict(zip((name.removeprefix("--") for name in words[::2]), words[1::2], strict=True))
        value = float(options.pop(axis))
        others = ", ".join(f"{name.rpartition('.')[2]} {told}" for name, told in sorted(options.items()))
        points.setdefault((others, value), []).append(row)
    made = []
    for (others, value), own in sorted(points.items()):
        accuracies = [row.accuracy for row in own]
        mean = sum(accuracies) / len(own)
        if len(own) > 1:
            low, high = mean - half_width(accuracies), mean + half_width(accuracies)
        else:
            _, low, high = share_interval(list(own[0].accuracies(own[0].right).values()))
        made.append({"others": others, "value": value, "mean": mean, "low": low, "high": high, "seeds": len(own)})
    return pd.DataFrame(made)


def draw(rows: Sequence[Row], axis: str, file: Path, profile: pd.DataFrame | None = None) -> None:
    """Writes the figure.

    Args:
        rows: rows of recipes that are told apart by their arguments
        axis: option of the command line on the horizontal axis, without dashes
        file: where the figure goes
        profile: alpha profile of the student before training, with the columns `alpha`, `log_p_right` and its ends,
            which is drawn below where the option is alpha
    """
    table = table_of(rows, axis)
    figure, axes = panels(1 if profile is None else 2, 1, 7.0, 4.2 if profile is None else 6.6)
    for number, (others, line) in enumerate(table.groupby("others")):
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "linewidth": 2}
        halves = [line["mean"] - line["low"], line["high"] - line["mean"]]
        seeds = int(line["seeds"].min())
        label = f"{others or axis}, {seeds} seed{'s' * (seeds > 1)}"
        axes[0].errorbar(line["value"], line["mean"], halves, label=label, capsize=3, **style)
    before = sum(row.accuracy_before for row in rows) / len(rows)
    axes[0].axhline(before, color=GREY, linestyle=":", label="before training")
    axes[0].set(xlabel=axis.rpartition(".")[2], ylabel="accuracy on held-out problems")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    values = sorted(set(table["value"]))
    _scale(axes[0], values)
    if profile is not None:
        own = profile[profile["alpha"].between(values[0], values[-1])]
        axes[1].plot(own["alpha"], own["log_p_right"], color=GREY, linewidth=2)
        axes[1].fill_between(own["alpha"], own["log_p_right_low"], own["log_p_right_high"], color=GREY, alpha=0.15)
        axes[1].set(xlabel="alpha", ylabel="log p of right tokens, the target's", title="foretold before training")
        _scale(axes[1], values)
    save(figure, file)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Marks the values that were run; settings that double stand equally far apart."""
    if values[0] > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
