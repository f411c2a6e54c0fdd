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


def mean_interval(values: Sequence[float]) -> ConfidenceInterval:
    """Returns mean ± t(0.975, N - 1) · s / √N of N values, whose standard deviation is s.

    One value alone says nothing about the interval, which then is endless.
    """
    if not len(values):
        raise ValueError("expected at least one value to average, got none")
    mean = float(np.mean(values))
    if len(values) == 1:
        return ConfidenceInterval(mean, -math.inf, math.inf)
    from scipy.special import stdtrit  # slow to import, and `--help` comes through here

    half = float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return ConfidenceInterval(mean, mean - half, mean + half)


def share_interval(values: Sequence[float]) -> ConfidenceInterval:
    """Returns the mean of N values in [0, 1] with the interval of `share_ends`; of one value alone it is [0, 1]."""
    if not len(values):
        raise ValueError("expected at least one value to average, got none")
    mean = float(np.mean(values))
    if len(values) == 1:
        return ConfidenceInterval(mean, 0.0, 1.0)
    low, high = share_ends(np.asarray(values, dtype=float))
    return ConfidenceInterval(mean, min(float(low), mean), max(float(high), mean))  # by rounding alone


def share_ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of a 95 % interval for the mean of N values in [0, 1], along the last axis.

    One value is added: a 0 for the lower end, a 1 for the upper. The Dirichlet distribution with a weight of 1 at each
    of the A = N + 1 values is what is believed of the values' distribution. Its mean has the mean and variance

        m = sum_i x_i / A        v = (sum_i x_i² / A - m²) / (A + 1)

    and the Beta distribution of the same two has the end as its quantile at 0.025, or at 0.975. For values of 0 and 1
    this is the exact interval of Clopper and Pearson, which holds the truth with 95 % and more at any N and any mean.
    Where all values are 0 or all are 1, this end is 0 or 1, and the other one is as far off as N tells.
    `analysis/coverage.py` shows how often such intervals hold the truth.
    """
    from scipy.special import betaincinv

    total = values.shape[-1] + 1
    first, second = values.sum(-1), (values * values).sum(-1)
    ends = []
    for added, quantile, certain in ((0.0, 0.025, values.max(-1) == 0), (1.0, 0.975, values.min(-1) == 1)):
        mean = np.clip((first + added) / total, 1e-9, 1 - 1e-9)  # a Beta distribution is not at 0 or 1 as a whole
        spread = np.maximum((second + added) / total - mean * mean, 1e-12)
        size = np.maximum(mean * (1 - mean) * (total + 1) / spread - 1, 1e-9)  # the a + b of Beta(a, b)
        ends.append(np.where(certain, added, betaincinv(mean * size, (1 - mean) * size, quantile)))
    return ends[0], ends[1]


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
