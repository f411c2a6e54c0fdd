"""Several processes make one step together, each with its share of prompts.

All have the same weights. Loss and gradient are sums over all tokens of the step, divided by a total that all processes
know. So the processes only have to add up their sums, whatever micro-batches each of them made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

Item = TypeVar("Item")

_PATIENCE = timedelta(hours=6)  # for one that samples: it is watched there, and one that is gone is noticed at once


@dataclass(frozen=True)
class ProcessGroup:
    """A process group lets processes exchange numbers; all of them call its methods, except `share`, in the same order.

    Args:
        rank: number of this process, from 0
        size: number of processes
        connection: connection of torch.distributed between them; None is the one that training has
    """

    rank: int = 0
    size: int = 1
    connection: Any = None

    def patient(self) -> ProcessGroup:
        """Returns the same processes with a connection of their own, over which they may wait for hours."""
        if self.size == 1 or self.connection is not None:
            return self
        return replace(self, connection=dist.new_group(backend="gloo", timeout=_PATIENCE))

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Returns this process's share of the items: those at rank, rank + size, rank + 2 size ..."""
        return list(items[self.rank :: self.size])

    def joined(self, own: Sequence[Item]) -> list[Item]:
        """Returns the shares of all processes, in the order that the items had before `share`."""
        shares = self.gathered(list(own))
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def summed(self, values: Sequence[float]) -> list[float]:
        """Returns each value's sum over all processes, with the same bits in each process."""
        return [sum(column) for column in zip(*self.gathered(list(values)), strict=True)]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient by its sum over all processes; a process without a gradient adds 0."""
        if self.size == 1:
            return
        own = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own])
        dist.all_reduce(flat)
        for p, part in zip(own, flat.split([p.numel() for p in own]), strict=True):
            p.grad = part.view_as(p)

    def gathered(self, own: Any) -> list[Any]:
        """Returns what each process has, in the order of their ranks."""
        if self.size == 1:
            return [own]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, own, group=self.connection)
        return everyone


def combined(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Returns the metrics of one step, made of those of all processes.

    Whole numbers are counts, and are added up. All other metrics are rates, of which the mean over prompts is taken; a
    process that lacks a rate does not count for it.

    Args:
        parts: number of prompts and metrics of each process
    """
    whole: dict[str, float] = {}
    for name in dict.fromkeys(name for _, row in parts for name in row):
        values = [(weight, row[name]) for weight, row in parts if name in row]
        counts = all(isinstance(value, int) for _, value in values)
        total = sum(value if counts else weight * value for weight, value in values)
        whole[name] = float(total) if counts else total / sum(weight for weight, _ in values)
    return whole
