"""A curve shows accuracy against each parameter, with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial

from ogls.system.statistics import mean_interval

_SEED, _MEAN = "#56b4e9", "#0072b2"  # Okabe and Ito


def draw_curve(trials: Sequence[FrozenTrial], accuracies: Sequence[Sequence[float]], title: str, file: Path) -> None:
    """Draws one panel per varied parameter: the accuracy of every seed, their mean, and the mean's 95 % interval.

    Bars may leave the panel: with two seeds the interval is thirteen times as long as their distance.

    Args:
        trials: complete trials
        accuracies: accuracies of each trial, one per seed
        title: beginning of the heading
        file: image to write
    """
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    varied = [name for name in names if len({t.params[name] for t in trials if name in t.params}) > 1]
    names = varied or names
    figure = Figure(figsize=(3.6 * len(names) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        chosen = [pair for pair in zip(trials, accuracies, strict=True) if name in pair[0].params]
        _panel(axes, name, [trial.params[name] for trial, _ in chosen], [values for _, values in chosen])
    low, high = min(map(min, accuracies)), max(map(max, accuracies))
    margin = 0.15 * (high - low) or 0.05
    panels[0].set_ylim(low - margin, high + margin)
    panels[0].set_ylabel("accuracy")
    seeds = max(map(len, accuracies))
    about = f"{seeds} seeds per trial, bars: 95 % over seeds" if seeds > 1 else "one seed per trial"
    figure.suptitle(f"{title}: {about}", fontsize=9, color="#555555")
    figure.savefig(file, dpi=150)


def _panel(axes: Axes, name: str, at: Sequence[object], accuracies: Sequence[Sequence[float]]) -> None:
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in at):
        places = [float(str(value)) for value in at]
    else:
        kinds = sorted({str(value) for value in at})
        places = [float(kinds.index(str(value))) for value in at]
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_xlim(-0.5, len(kinds) - 0.5)
    for x, values in zip(places, accuracies, strict=True):
        axes.plot([x] * len(values), values, ".", color=_SEED, markersize=5)
    means = [math.fsum(values) / len(values) for values in accuracies]
    axes.errorbar(places, means, [half_width(values) for values in accuracies], fmt="o", color=_MEAN, markersize=5)
    axes.set_xlabel(name)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def half_width(values: Sequence[float]) -> float:
    """Returns half of the 95 % interval of the mean of independent values, see `mean_interval`; 0 for a single one."""
    interval = mean_interval(values)
    return interval.high - interval.mean if len(values) > 1 else 0.0
