"""Means get confidence intervals, and pairs of runs get a t-test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class ConfidenceInterval(NamedTuple):
    """A confidence interval is a mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf) -> ConfidenceInterval:
    """Returns mean ± t(0.975, N - 1) · s / √N of N values, cut to [lowest, highest].

    s is their standard deviation. One value alone says nothing about the interval, which then is the whole range.
    """
    if not len(values):
        raise ValueError("expected at least one value to average, got none")
    mean = float(np.mean(values))
    if len(values) == 1:
        return ConfidenceInterval(mean, lowest, highest)
    from scipy.special import stdtrit  # slow to import, and `--help` comes through here

    half = float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return ConfidenceInterval(mean, max(mean - half, lowest), min(mean + half, highest))


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A paired difference is the mean over problems of after - before, with its 95 % interval and a p-value.

    The p-value is two-sided, for the hypothesis that there is no difference.
    """

    mean: float
    low: float
    high: float
    p_value: float
    num_problems: int


def paired_difference(before: Mapping[str, float], after: Mapping[str, float]) -> PairedDifference:
    """Returns the result of Student's paired t-test over the same problems.

    With N problems, d = after - before, t = mean(d) √N / s(d) and p = 2 T(-|t|) for T of N - 1 degrees of freedom.
    One problem alone says nothing: p = 1. If all differences are alike, p is 1 if they are 0, and 0 otherwise.

    Args:
        before: accuracy of each problem, by its id
        after: accuracy of each problem later or elsewhere, by the same ids

    Raises:
        ValueError: the problems differ.
    """
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise ValueError(f"expected the same problems before and after, got {len(odd)} in one only: {odd[:5]}")
    from scipy.special import stdtr

    differences = [after[problem] - before[problem] for problem in before]
    count = len(differences)
    mean, low, high = mean_interval(differences)
    spread = float(np.std(differences, ddof=1)) if count > 1 else 0.0
    if count == 1 or (spread == 0 and mean == 0):
        p_value = 1.0
    else:
        p_value = float(2 * stdtr(count - 1, -abs(mean) * math.sqrt(count) / spread)) if spread else 0.0
    return PairedDifference(mean=mean, low=low, high=high, p_value=p_value, num_problems=count)
