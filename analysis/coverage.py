"""How often do the intervals of one evaluation hold the truth? Simulated evaluations whose truth is known exactly.

    python analysis/coverage.py

A problem has a chance p of being answered right, drawn from one of five distributions (the shapes); of k samples those
that are wrong give one of three wrong answers, with chances 0.5, 0.3 and 0.2. An evaluation of n problems gives avg@k,
pass@k and maj@k, each with an interval: that of `ogls.system.statistics.share_ends`, and Student's t for comparison.
Coverage is the share of simulated evaluations whose interval holds the mean over all problems there could be.

Writes NAME.csv (coverage and mean width of both, by shape, figure, k and n) and NAME.md (coverage, t's in parentheses).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import factorial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import roots_jacobi, stdtrit

from ogls.system.statistics import share_ends

NUM_PROBLEMS, NUM_SAMPLES = (30, 128, 256, 500), (1, 4, 8, 16)
WRONG = np.array([0.5, 0.3, 0.2])
"""Chances of the wrong answers, where an answer is wrong."""


@dataclass(frozen=True)
class Shape:
    """A shape is a distribution of the chance to be right; its nodes and weights average polynomials exactly.

    Args:
        draw: function from a random generator and a size to that many chances
        nodes: chances at which a polynomial is evaluated
        weights: weight of each node; they sum to 1
    """

    draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
    nodes: np.ndarray
    weights: np.ndarray


def beta(a: float, b: float) -> Shape:
    """Returns a Beta distribution, with the nodes of Gauss and Jacobi for polynomials of degree 39 and less."""
    nodes, weights = roots_jacobi(20, b - 1, a - 1)
    return Shape(lambda rng, size: rng.beta(a, b, size), (1 + nodes) / 2, weights / weights.sum())


def two_points(low: float, high: float, share: float) -> Shape:
    """Returns a mixture: a share of the problems has the chance `high`, all others have `low`."""
    return Shape(
        lambda rng, size: np.where(rng.random(size) < share, high, low),
        np.array([low, high]),
        np.array([1 - share, share]),
    )


SHAPES = {
    "hardly any right: Beta(0.05, 3)": beta(0.05, 3),
    "all or nothing: Beta(0.5, 0.5)": beta(0.5, 0.5),
    "evenly spread: Beta(1, 1)": beta(1, 1),
    "nearly all right: Beta(3, 0.05)": beta(3, 0.05),
    "a tenth at 0.9, the rest at 0.02": two_points(0.02, 0.9, 0.1),
}


def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns avg@k, pass@k and maj@k of problems, from how often each answer came; the right one is the first.

    Args:
        counts: array with the axes [..., answers]
    """
    right, best = counts[..., 0], counts[..., 1:].max(-1)
    ties = (counts[..., 1:] == best[..., None]).sum(-1)
    voted = np.where(right > best, 1.0, np.where(right == best, 1 / (1 + ties), 0.0))
    return {"avg": right / counts.sum(-1), "pass": (right > 0) * 1.0, "maj": voted}


def truth(shape: Shape, k: int) -> dict[str, float]:
    """Returns the mean over all problems of a shape: an exact sum over all ways that k samples can fall."""
    ways = np.array([c for c in product(range(k + 1), repeat=4) if sum(c) == k])
    factorials = np.array([factorial(i) for i in range(k + 1)], dtype=float)
    chances = factorials[k] / factorials[ways].prod(-1) * (WRONG ** ways[:, 1:]).prod(-1)
    right = ways[:, 0]
    of_node = shape.nodes[:, None] ** right * (1 - shape.nodes[:, None]) ** (k - right)
    chances = chances * (shape.weights @ of_node)
    return {figure: float(chances @ values) for figure, values in scores(ways).items()}


def t_ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of Student's t interval at 95 %, cut to [0, 1], along the last axis."""
    n, mean = values.shape[-1], values.mean(-1)
    half = stdtrit(n - 1, 0.975) * values.std(-1, ddof=1) / np.sqrt(n)
    return np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1)


def coverage(shape: Shape, k: int, num_problems: Sequence[int], repetitions: int, seed: int) -> pd.DataFrame:
    """Returns one row per figure and number of problems: coverage and mean width of the interval, and of t's."""
    rng, expected = np.random.default_rng(seed), truth(shape, k)
    chances = shape.draw(rng, (repetitions, max(num_problems)))[..., None]
    found = scores(rng.multinomial(k, np.concatenate([chances, (1 - chances) * WRONG], -1)))
    rows = []
    for (figure, values), n in product(found.items(), num_problems):
        row = {"figure": figure, "k": k, "n": n}
        for name, ends in (("", share_ends), ("t ", t_ends)):
            low, high = ends(values[:, :n])
            # By rounding alone a truth of 1 and an end of 1 may differ.
            held = (low <= expected[figure] + 1e-12) & (expected[figure] - 1e-12 <= high)
            row |= {f"{name}coverage": held.mean(), f"{name}width": (high - low).mean()}
        rows.append(row)
    return pd.DataFrame(rows)


def whole(table: pd.DataFrame) -> str:
    """Returns all of a table for the eye: a row per shape, figure and k, a column per number of problems."""
    return _shown(table, ["shape", "figure", "k"])


def summary(table: pd.DataFrame) -> str:
    """Returns the lowest coverage over k, of both intervals: a row per shape and figure."""
    return _shown(table, ["shape", "figure"])


def _shown(table: pd.DataFrame, keys: list[str]) -> str:
    lines = [f"| {' | '.join([*keys, *(f'n = {n}' for n in NUM_PROBLEMS)])} |"]
    lines += ["|" + "---|" * len(keys) + "---:|" * len(NUM_PROBLEMS)]
    for key, some in table.groupby(keys, sort=False):
        lowest = some.groupby("n")[["coverage", "t coverage"]].min()
        cells = [f"{ours:.3f} ({students:.3f})" for ours, students in lowest.loc[list(NUM_PROBLEMS)].to_numpy()]
        lines.append(f"| {' | '.join([*map(str, key), *cells])} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=4000, help="evaluations per cell; default: %(default)s")
    out = Path(__file__).parent / "results" / "coverage"
    parser.add_argument("--out", type=Path, default=out, metavar="NAME", help="default: %(default)s")
    options = parser.parse_args(arguments)
    parts = []
    for (name, shape), k in product(SHAPES.items(), NUM_SAMPLES):
        part = coverage(shape, k, NUM_PROBLEMS, options.repetitions, seed=k)
        parts.append(part.assign(shape=name)[["shape", *part.columns]])
    table = pd.concat(parts).sort_values(["shape", "figure", "k", "n"], key=_order).round(4)
    table.to_csv(options.out.with_suffix(".csv"), index=False)
    options.out.with_suffix(".md").write_text(whole(table), encoding="utf-8")
    print(summary(table))
    right = table[table["t coverage"] >= 0.94]  # where t is right, its width is what there is to have
    ratio = right["width"] / right["t width"]
    print(f"lowest coverage: {table['coverage'].min():.3f}, of t: {table['t coverage'].min():.3f}")
    print(f"width where t holds 94 % and more: {ratio.median():.3f} times t's, {ratio.max():.3f} at most")
    print(f"written: {options.out}.csv, .md")


def _order(column: pd.Series) -> pd.Series:
    places = {name: place for place, name in enumerate([*SHAPES, "avg", "pass", "maj"])}
    return column.map(places) if column.dtype.kind not in "iuf" else column


if __name__ == "__main__":
    main()
