"""What can be said about methods from a few seeds on some problems: differences, corrections, seeds that are needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import mannwhitneyu, nct, t, trim_mean

FEWEST, MOST = 3, 200
"""Seeds below which a difference over seeds and problems is not judged, and above which none are asked for."""


@dataclass(frozen=True)
class Components:
    """Components are the mean squares of differences in a table of seeds and problems, with one value per cell.

        d_sp = difference + a_s + b_p + e_sp

    Seeds, problems and what is left are random and independent; problems are the same for all seeds.

    Args:
        num_seeds: number of seeds, at least 2
        num_problems: number of problems, at least 2
        of_seeds: mean square of the seeds' means, which is var(e) + num_problems var(a) on average
        of_problems: mean square of the problems' means, which is var(e) + num_seeds var(b) on average
        of_rest: mean square of what is left, which is var(e) on average
    """

    num_seeds: int
    num_problems: int
    of_seeds: float
    of_problems: float
    of_rest: float

    @classmethod
    def of(cls, differences: np.ndarray) -> Components:
        """Returns the components of a table with the axes [seeds, problems]."""
        (num_seeds, num_problems), mean = differences.shape, differences.mean()
        seeds, problems = differences.mean(1), differences.mean(0)
        rest = differences - seeds[:, None] - problems + mean
        return cls(
            num_seeds,
            num_problems,
            of_seeds=float(num_problems * seeds.var(ddof=1)),
            of_problems=float(num_seeds * problems.var(ddof=1)),
            of_rest=float((rest**2).sum() / ((num_seeds - 1) * (num_problems - 1))),
        )

    def expected(self, num_seeds: int) -> Components:
        """Returns the components that another number of seeds would have on average."""
        var_seeds = max(0.0, self.of_seeds - self.of_rest) / self.num_problems
        var_problems = max(0.0, self.of_problems - self.of_rest) / self.num_seeds
        return Components(
            num_seeds,
            self.num_problems,
            of_seeds=self.of_rest + self.num_problems * var_seeds,
            of_problems=self.of_rest + num_seeds * var_problems,
            of_rest=self.of_rest,
        )

    @property
    def error(self) -> tuple[float, float]:
        """Returns the standard error of the mean difference, and its degrees of freedom (Satterthwaite).

        Its square is (of_seeds + of_problems - of_rest) / cells, never below what seeds or problems alone would say.
        """
        free_seeds, free_problems = self.num_seeds - 1, self.num_problems - 1
        both = self.of_seeds + self.of_problems - self.of_rest
        parts = ((self.of_seeds, free_seeds), (self.of_problems, free_problems))
        parts += ((self.of_rest, free_seeds * free_problems),)
        spread = sum(part**2 / free for part, free in parts)
        square, free = max((both, both**2 / spread if spread else 1.0), *parts[:2])
        return math.sqrt(max(square, 0.0) / (self.num_seeds * self.num_problems)), max(1.0, free)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of two methods has half of its 95 % interval, and a two-sided p-value for there being none."""

    mean: float
    half: float
    p_value: float


def difference(differences: np.ndarray) -> Difference:
    """Returns the mean difference, judged for new seeds on new problems; below three seeds nothing is claimed.

    Args:
        differences: array with the axes [seeds, problems]
    """
    if differences.shape[0] < FEWEST or differences.shape[1] < 2:
        return Difference(
            mean=float(differences.mean()) if differences.size else math.nan, half=math.nan, p_value=math.nan
        )
    mean, (error, free) = float(differences.mean()), Components.of(differences).error
    if error == 0:
        return Difference(mean=mean, half=0.0, p_value=float(mean == 0))
    return Difference(
        mean=mean, half=float(t.ppf(0.975, free) * error), p_value=float(2 * t.sf(abs(mean) / error, free))
    )


def seeds_needed(differences: np.ndarray, wanted: float, power: float = 0.8) -> int | None:
    """Returns the number of seeds with which a difference would be found; None where seeds alone will not do.

    Found is p < 0.05 of `difference`, by the noncentral t distribution, with variances as in the present runs. The
    problems stay as many as they are: what they contribute to the error does not shrink with seeds.

    Args:
        differences: array with the axes [seeds, problems], of at least two seeds
        wanted: true difference that is to be found
        power: probability with which it is found
    """
    found = Components.of(differences)
    for num_seeds in range(FEWEST, MOST + 1):
        error, free = found.expected(num_seeds).error
        if error == 0:
            return num_seeds
        bound, shift = t.ppf(0.975, free), wanted / error
        if nct.sf(bound, free, shift) + nct.cdf(-bound, free, shift) >= power:
            return num_seeds
    return None


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number by Holm's method; nan stays nan and does not count.

    The i-th smallest of m is multiplied by m - i + 1, and none is below one that was smaller before.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for number, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - number)))
        corrected[place] = highest
    return corrected


def interquartile_mean(scores: np.ndarray) -> float:
    """Returns the mean of the middle half of all scores of a method, those of all sets together.

    Source: Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice".

    Args:
        scores: array with the axes [runs, sets]
    """
    return float(trim_mean(scores, 0.25, axis=None))


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the probability that a run of one method is better than a run of another one, averaged over sets.

    A tie counts one half: this is Mann and Whitney's U over the number of pairs of runs. Source: as above.

    Args:
        ours: scores of the one method, with the axes [runs, sets]
        theirs: scores of the other method, with the same sets
    """
    pairs = len(ours) * len(theirs)
    wins = [
        mannwhitneyu(one, other, method="asymptotic").statistic / pairs
        for one, other in zip(ours.T, theirs.T, strict=True)
    ]
    return float(np.mean(wins))
