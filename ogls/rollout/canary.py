"""A canary tells whether an engine samples from the weights that it was given last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from ogls.records import Sampling
from ogls.rollout.engine import RolloutEngine

if TYPE_CHECKING:
    from ogls.policy.policy import Policy

_SURE = 5.0  # standard deviations


@dataclass(frozen=True)
class _Song:
    """A song is what the engine once drew after each prompt, with the log-probabilities by the weights of `version`."""

    version: int
    ids: list[tuple[int, ...]]
    logprobs: list[Float[Tensor, " _"]]


class Canary:
    """A canary draws a few tokens from an engine after each load, always after the same prompts and with one seed.

    The log-probabilities that the engine gives these tokens have to be the policy's, but for rounding. Small updates
    hide in the rounding: an engine that never took any can pass. So the engine also has to fit the present weights
    better than older ones, which are those of the two loads before and those of the start. The same seed draws mostly
    the same tokens again, and for each of them it is known what older weights said: numbers are kept, and no weights.
    Only a run that goes on reads the start's weights, once.

    Args:
        max_gap: largest mean difference of log-probabilities between engine and policy
    """

    def __init__(self, max_gap: float) -> None:
        self.max_gap = max_gap
        self._songs: list[_Song] = []  # the start, then the latest two

    def check(self, engine: RolloutEngine, policy: Policy, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
        """Draws up to `max_tokens` tokens after each prompt, and returns by how much their log-probs differ on average.

        Raises:
            RuntimeError: the engine differs too much from the policy, or fits older weights better.
        """
        # Drawn, not given: an engine that scores given tokens uses no prefix cache, and a stale one has to be found.
        drawn = [c for (c,) in engine.generate(prompts, Sampling(max_tokens=max_tokens), 1, seed=0)]
        ids, theirs = [c.token_ids for c in drawn], [torch.tensor(c.logprobs) for c in drawn]
        now, version = logprobs(policy, prompts, ids), engine.version
        gap = float((torch.cat(theirs) - torch.cat(now)).abs().mean())
        if not self._songs and version:  # before anything is refused: other processes may make the same passes
            with policy.at_start():
                self._songs.append(_Song(0, ids, logprobs(policy, prompts, ids)))
        if not gap <= self.max_gap:
            raise RuntimeError(
                f"the engine does not sample from the policy: log-probs differ by {gap:.3f} on average, expected "
                f"{self.max_gap} at most"
            )
        for song in self._songs:
            if song.version != version:
                again = [_common(new, old) for new, old in zip(ids, song.ids, strict=True)]
                parts = ([x[:count] for x, count in zip(of, again, strict=True)] for of in (theirs, now, song.logprobs))
                nearer, tokens = count_nearer(*map(torch.cat, parts))
                if nearer < tokens / 2 - _SURE * tokens**0.5 / 2:
                    raise RuntimeError(
                        f"the engine does not hold the present weights, version {version}: of {tokens} tokens, it "
                        f"gives {nearer} a log-prob nearer to theirs than to that of version {song.version}; it did "
                        "not take them, or its dtype rounds them away"
                    )
        if not self._songs:
            self._songs = [_Song(version, ids, now)]
        elif version != self._songs[0].version:
            others = [song for song in self._songs[1:] if song.version != version]
            self._songs = [self._songs[0], *others[-1:], _Song(version, ids, now)]
        return gap


def count_nearer(
    theirs: Float[Tensor, " tokens"], now: Float[Tensor, " tokens"], old: Float[Tensor, " tokens"]
) -> tuple[int, int]:
    """Returns for how many tokens `theirs` is nearer to `now` than to `old`, and of how many where these differ."""
    differ = now != old
    nearer = (theirs - now).abs() < (theirs - old).abs()
    return int((nearer & differ).sum()), int(differ.sum())


@torch.no_grad()
def logprobs(
    policy: Policy, prompts: Sequence[Sequence[int]], suffixes: Sequence[tuple[int, ...]]
) -> list[Float[Tensor, " _"]]:
    """Returns the log-probability of every token of the suffixes by the policy's present weights."""
    weight, bias = policy.head
    states = policy.hidden(prompts, suffixes, range(len(prompts)))
    logprobs = linear(states.to(weight.dtype), weight, bias).float().log_softmax(-1)
    ids = torch.tensor([i for suffix in suffixes for i in suffix], device=logprobs.device)
    return list(logprobs.gather(1, ids[:, None])[:, 0].cpu().split([len(suffix) for suffix in suffixes]))


def _common(new: Sequence[int], old: Sequence[int]) -> int:
    """Returns the number of tokens at the beginning of both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(new, old, strict=False)))
