"""Accuracies of several samples per problem are avg@k, pass@k and maj@k.

The unit is the problem. Every figure is a mean over problems of an estimate that is unbiased for each problem. Its 95 %
interval holds for new problems of the same kind, near 0 and 1 too; where all problems score alike, it still has a width
(`ogls.system.statistics.share_ends`, and docs/statistics.md).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import comb
from typing import Any, TypeVar

import numpy as np

from ogls.records import RolloutGroup, Sampling
from ogls.system.ranges import within
from ogls.system.statistics import share_interval

REFLECTION_MARKERS = ("wait", "hold on", "oops", "not quite", "let me rethink", "let me reconsider", "let me check")
"""A text with one of these words shows a sign of reflection (OGLS-SD, figure 5)."""
VALIDATION, SUBSET = "val", "val_subset"  # where the figures of all held-out problems are logged, and of the subset
_MARKED = re.compile(rf"\b(?:{'|'.join(REFLECTION_MARKERS)})\b", re.IGNORECASE)


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Subset:
    """A subset is what a validation amid training samples: some of the problems, always the same, and less often.

    Args:
        problems: number of held-out problems of each set, evenly spaced among all of it; null takes all, as does a
            number above theirs
        samples: rollouts per problem; null takes as many as the whole validation
    """

    problems: int | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("problems", "samples"):
            within(f"evaluation.while_training.{name}", getattr(self, name), "[1, 1e9]")

    def of(self, items: Sequence[T], set_of: Callable[[T], str] = lambda _: "") -> list[T]:
        """Returns the items, one per held-out problem, that belong to the subset, in their order.

        Args:
            items: what there is one of per problem, set by set
            set_of: function from an item to the name of its problem's set
        """
        chosen = []
        for _, group in groupby(items, set_of):
            some = list(group)
            count = min(self.problems or len(some), len(some))
            chosen += [some[i * len(some) // count] for i in range(count)]
        return chosen


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation says how held-out problems are sampled.

    Args:
        samples: rollouts per problem, the k of avg@k, pass@k and maj@k
        sampling: rule by which tokens of these rollouts are drawn
        with_solution: whether the problems are sampled a second time with the reference solution in the prompt, which
            shows whether the model uses what it reads
        while_training: subset that validations amid training sample, while those before and after it sample all; null
            samples all in each
        show: number of problems, evenly spaced, that the terminal shows at each validation: the problem, its first
            rollout and the verdict
    """

    samples: int = 4
    sampling: Sampling = Sampling(max_tokens=1024)
    with_solution: bool = False
    while_training: Subset | None = None
    show: int = 0

    def __post_init__(self) -> None:
        within("evaluation.show", self.show, "[0, 1e9]")
        if self.samples < 1:
            raise ValueError(f"evaluation.samples must be at least 1, got {self.samples}")
        if self.subset_samples > self.samples:
            raise ValueError(
                f"evaluation.while_training.samples must be at most evaluation.samples {self.samples}, got "
                f"{self.subset_samples}"
            )

    @property
    def subset_samples(self) -> int:
        """Returns the rollouts per problem of a validation amid training."""
        asked = self.while_training.samples if self.while_training else None
        return asked or self.samples

    @property
    def watched(self) -> tuple[str, int]:
        """Returns the name and the samples of the figures that every validation has, so that they can be compared."""
        return (VALIDATION if self.while_training is None else SUBSET), self.subset_samples

    def by_name(self, groups: Sequence[RolloutGroup], whole: bool) -> dict[str, Sequence[RolloutGroup]]:
        """Returns groups of a validation by the name that their figures are logged under.

        Figures of different problems never share a name. A whole validation holds the subset's figures, too: those of
        the first samples of its problems.

        Args:
            groups: groups of the validation, in the order of the problems
            whole: whether these are all problems; otherwise the subset's
        """
        if self.while_training is None:
            return {VALIDATION: groups}
        if not whole:
            return {SUBSET: groups}
        some = self.while_training.of(groups, lambda group: group.problem.set)
        part = [replace(g, rollouts=g.rollouts[: self.subset_samples]) for g in some]
        return {VALIDATION: groups, SUBSET: part}


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns the probability that k of the n samples, drawn without replacement, hold a correct one.

        pass@k = 1 - C(n - c, k) / C(n, k)        with n = num_samples, c = num_correct

    Source: Chen et al. 2021, "Evaluating large language models trained on code", equation 1.
    """
    _check_k(k, num_samples)
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def maj_at_k(num_samples: int, num_correct: int, wrong_votes: Sequence[int], k: int) -> float:
    """Returns the probability that the correct answer wins the vote among k of the n samples.

    The k samples are drawn without replacement. A tie of m answers counts 1/m. The result is exact: for each number j
    of correct samples drawn, the coefficient of x^(k - j) in the product over all other answers of the polynomials
    sum_i C(w, i) x^i, i <= j, counts the draws in which none of them beats it; those with i = j are the ties.

    Args:
        num_samples: number n of samples
        num_correct: number c of samples with the correct answer
        wrong_votes: number w of samples of each wrong answer; the other n - c - sum(w) samples do not vote
        k: number of samples that vote
    """
    _check_k(k, num_samples)
    silent = num_samples - num_correct - sum(wrong_votes)
    if silent < 0:
        raise ValueError(f"expected at most {num_samples} samples, got {num_correct} correct and {list(wrong_votes)}")
    won = 0.0
    for j in range(1, min(k, num_correct) + 1):
        draws = {(size, 0): comb(silent, size) for size in range(k - j + 1)}  # (samples drawn, ties) -> ways
        for votes in wrong_votes:
            longer: Counter[tuple[int, int]] = Counter()
            for (size, ties), ways in draws.items():
                for i in range(min(j, votes, k - j - size) + 1):
                    longer[size + i, ties + (i == j)] += ways * comb(votes, i)
            draws = longer
        won += comb(num_correct, j) * sum(ways / (1 + ties) for (size, ties), ways in draws.items() if size == k - j)
    return won / comb(num_samples, k)


def evaluate(groups: Sequence[RolloutGroup], ks: Sequence[int] | None = None) -> dict[str, float]:
    """Returns the accuracies of groups that all have the same number n of rollouts, by name.

    The names are ``avg_at_n``, and ``pass_at_k`` and ``maj_at_k`` for each k, each with the ends of its interval as
    ``_low`` and ``_high``; ``length_mean`` in tokens; ``truncated_rate``, ``unparsable_rate`` and ``unclosed_rate``
    (those that end within a thought) over rollouts. A truncated rollout is wrong and does not vote. A rollout that ran
    out of time or crashed while it was graded does not vote either. Where a verifier says right or wrong and not which
    answer a text gives, there is no vote, and no ``maj_at_k``.

    Args:
        groups: one group per problem, at least one
        ks: numbers k of samples; None takes the powers of two below n, and n

    Raises:
        ValueError: groups differ in size, or a k is above n.
    """
    sizes = {len(group.rollouts) for group in groups}
    if len(sizes) != 1:
        raise ValueError(f"expected groups of one and the same number of rollouts, got sizes {sorted(sizes)}")
    (n,) = sizes
    tallies = [_Tally.of(group) for group in groups]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    vote = all(rollout.verdict.answer is not None for rollout in rollouts if rollout.verdict.status == "graded")
    metrics = _named(f"avg_at_{n}", [tally.num_correct / n for tally in tallies])
    for k in ks if ks is not None else [*_powers_of_two(n), n]:
        metrics |= _named(f"pass_at_{k}", [pass_at_k(n, tally.num_correct, k) for tally in tallies])
        if vote:
            votes = [maj_at_k(n, tally.num_correct, tally.wrong_votes, k) for tally in tallies]
            metrics |= _named(f"maj_at_{k}", votes)
    metrics["length_mean"] = float(np.mean([len(rollout.completion.token_ids) for rollout in rollouts]))
    metrics["truncated_rate"] = float(np.mean([rollout.truncated for rollout in rollouts]))
    metrics["unparsable_rate"] = float(np.mean([rollout.verdict.status == "unparsable" for rollout in rollouts]))
    metrics["unclosed_rate"] = float(np.mean([rollout.unclosed for rollout in rollouts]))
    return metrics


def by_set(groups: Sequence[RolloutGroup]) -> dict[str, list[RolloutGroup]]:
    """Returns the groups of each evaluation set by its name; none where there is a single one."""
    names = dict.fromkeys(group.problem.set for group in groups if group.problem.set)
    return {name: [group for group in groups if group.problem.set == name] for name in names}


@dataclass(frozen=True)
class _Tally:
    num_correct: int
    wrong_votes: tuple[int, ...]

    @classmethod
    def of(cls, group: RolloutGroup) -> _Tally:
        wrong = Counter(rollout.verdict.answer for rollout in group.failures if not rollout.truncated)
        del wrong[None]
        return cls(len(group.successes), tuple(wrong.values()))


def _named(name: str, values: Sequence[float]) -> dict[str, float]:
    mean, low, high = share_interval(values)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _powers_of_two(n: int) -> list[int]:
    return [2**exponent for exponent in range(n.bit_length()) if 2**exponent < n]


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"expected k from 1 to the number of samples {num_samples}, got {k}")


def summarise(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Returns metrics of one step's rollouts, by name: rates per rollout, except for counts of faults."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {}
    count = len(rollouts)
    return {
        "accuracy": sum(r.correct for r in rollouts) / count,
        "mixed_groups": sum(g.mixed for g in groups) / len(groups),
        "length_mean": sum(len(r.completion.token_ids) for r in rollouts) / count,
        "truncated_rate": sum(r.truncated for r in rollouts) / count,
        "unparsable_rate": sum(r.verdict.status == "unparsable" for r in rollouts) / count,
        "unclosed_rate": sum(r.unclosed for r in rollouts) / count,
        "verdict_faults": sum(r.verdict.status in ("timeout", "crash") for r in rollouts),
        "reflection_markers": sum(count_reflection_markers(r.text) for r in rollouts) / count,
    }


def count_reflection_markers(text: str) -> float:
    """Returns the number of reflection markers, as whole words, per 100 words."""
    return 100.0 * len(_MARKED.findall(text)) / max(1, len(text.split()))


def marker_ids(tokenizer: Any) -> list[int]:
    """Returns the ids of reflection markers that are one token, at the beginning of a line or after a space.

    A marker of several tokens is left out: its first token ("let", "not") would say little.
    """
    forms = [lead + form for m in REFLECTION_MARKERS for form in (m, m.capitalize()) for lead in ("", " ")]
    ids = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    return sorted({found[0] for found in ids if len(found) == 1})
