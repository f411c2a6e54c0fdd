"""Runs tiny models with the kernels of `ogls.policy` in Triton's interpreter, and without them.

TRITON_INTERPRET=1 python interpreted_layers.py FILE      # a dict by architecture, through torch.save
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from random_models import write_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ogls.policy import fused
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy

ARCHITECTURES = ("llama", "qwen3", "smollm3")
PREFIX, SUFFIXES = [5, 6, 7, 8], [[9, 10, 11], [12], [13, 14, 15, 16, 17]]


class Calls(TorchDispatchMode):
    """Counts calls of the project's own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "ogls":
            self.counts[function.__name__.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def states_and_gradients(policy: Policy) -> tuple[list[Tensor], Counter[str]]:
    with Calls() as calls:
        states = policy.hidden([PREFIX], SUFFIXES, [0, 0, 0])
        weights = list(policy.trainable().values())
        total = (states * torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)).sum()
        return [states.detach(), *torch.autograd.grad(total, weights)], calls.counts


def main(file: str) -> None:
    results = {}
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            model = write_model(Path(folder), architecture, attention_bias=False)
            policy = Policy(str(model), lora=Lora(rank=4), dtype="float32").load().double()
        for p in policy.trainable().values():
            p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        plain, none = states_and_gradients(policy)
        with mock.patch.object(fused, "has_kernels", return_value=True):
            by_kernel, calls = states_and_gradients(policy)
        results[architecture] = {"plain": plain, "by_kernel": by_kernel, "calls": dict(calls), "none": dict(none)}
    torch.save(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
