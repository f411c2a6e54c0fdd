"""How the figures look: colours that the colour-blind can tell apart (Okabe and Ito), light grid, nothing else."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("agg")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#555555"


def panels(rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its axes, row by row; sizes in inches."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), constrained_layout=True, squeeze=False)
    for one in axes.flat:
        one.grid(axis="y", color="#dddddd", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=200)
    plt.close(figure)
