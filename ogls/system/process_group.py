"""Several processes that make one step together: each works its share of the prompts, all have the same weights.

Loss and gradients are sums over all tokens of the step divided by a total that all processes know, so adding up what
each has is all there is to do, however many micro-batches it took.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

Item = TypeVar("Item")


@dataclass(frozen=True)
class ProcessGroup:
    """This process is number `rank` of `size`. Every method but `share` is called by all of them, in the same order."""

    rank: int = 0
    size: int = 1

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Items rank, rank + size, rank + 2 size ..."""
        return list(items[self.rank :: self.size])

    def joined(self, own: Sequence[Item]) -> list[Item]:
        """The shares of all, in the order of what was shared."""
        shares = self.gathered(list(own))
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def summed(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, the same bits in each."""
        return [sum(column) for column in zip(*self.gathered(list(values)), strict=True)]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes; a process without one adds nothing."""
        if self.size == 1:
            return
        own = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own])
        dist.all_reduce(flat)
        for p, part in zip(own, flat.split([p.numel() for p in own]), strict=True):
            p.grad = part.view_as(p)

    def gathered(self, own: Any) -> list[Any]:
        """What each process has, in the order of their numbers."""
        if self.size == 1:
            return [own]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, own)
        return everyone


def combined(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Metrics of one step from what processes of so many prompts each have measured.

    Whole numbers are counts and add up. Of the others it is the mean over the prompts of the processes that have it.
    """
    whole: dict[str, float] = {}
    for name in dict.fromkeys(name for _, row in parts for name in row):
        values = [(weight, row[name]) for weight, row in parts if name in row]
        counts = all(isinstance(value, int) for _, value in values)
        total = sum(value if counts else weight * value for weight, value in values)
        whole[name] = float(total) if counts else total / sum(weight for weight, _ in values)
    return whole
