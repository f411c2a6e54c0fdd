"""Groups that teach nothing are drawn again from other problems, a few times at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ogls.records import Problem, RolloutGroup, Sampling
from ogls.rollout.accuracy import summarise
from ogls.rollout.sampler import Sampler
from ogls.system.seeds import derive

More = Callable[[Sequence[int], int], tuple[list[Problem], list[tuple[int, ...]]]]


class Refilling:
    """A refilling sampler replaces groups that teach nothing by groups of other problems.

    This is the dynamic sampling of DAPO (arXiv 2503.14476), with an end. After the last draw a group that still teaches
    nothing stays. `metrics` is of the last call: rates of the first draw, which no replacement has made easier or
    harder, the number of groups sampled in addition, and of those that still teach nothing.

    Args:
        sampler: source of graded rollouts, which holds the weights to sample from
        teaches: whether a group gives a lesson
        more: function from the places of groups and the number of the draw, from 0, to other problems and their prompts
        draws: largest number of further draws per step
    """

    def __init__(self, sampler: Sampler, teaches: Callable[[RolloutGroup], bool], more: More, draws: int) -> None:
        self.version, self.replies, self.at_start = sampler.version, sampler.replies, sampler.at_start
        self._sampler, self._teaches, self._more, self._draws = sampler, teaches, more, draws
        self.metrics: dict[str, float] = {}
        self.num_tokens = 0  # sampled in the last call

    def rollouts(
        self, problems: Sequence[Problem], prompts: Sequence[tuple[int, ...]], n: int, sampling: Sampling, seed: int
    ) -> list[RolloutGroup]:
        """Returns one group of `n` graded rollouts for every problem, or for another one in its place."""
        groups = self._sampler.rollouts(problems, prompts, n, sampling, seed)
        self.metrics, self.num_tokens, refilled = summarise(groups), _tokens(groups), 0
        for draw in range(self._draws):
            silent = [i for i, group in enumerate(groups) if not self._teaches(group)]
            if not silent:
                break
            others = self._more(silent, draw)
            fresh = self._sampler.rollouts(*others, n, sampling, derive(seed, "refill", draw))
            for place, group in zip(silent, fresh, strict=True):
                groups[place] = group
            refilled, self.num_tokens = refilled + len(silent), self.num_tokens + _tokens(fresh)
        self.metrics |= {
            "groups_refilled": refilled,
            "groups_silent": sum(not self._teaches(group) for group in groups),
        }
        return groups


def _tokens(groups: Sequence[RolloutGroup]) -> int:
    return sum(len(rollout.completion.token_ids) for group in groups for rollout in group.rollouts)
