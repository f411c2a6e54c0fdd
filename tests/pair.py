"""Module and data that share one policy and one method, made from one set of keyword arguments."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from ogls.data import RolloutDataModule
from ogls.methods import Method
from ogls.module import SelfDistillation
from ogls.policy.policy import Policy


def taken(part: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that `part` takes."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(part).parameters}


def make_pair(
    folder: Path, *, kind: type[SelfDistillation] = SelfDistillation, load: bool = True, **arguments: Any
) -> tuple[SelfDistillation, RolloutDataModule]:
    """Gives every argument to what takes it: policy, method, module or data.

    Args:
        folder: of the model
        kind: of the module
        load: whether the weights are read at once, so that the same seed makes the same adapter
        arguments: by the names that `Policy`, `Method`, the module and the data have for them; `method` is a whole one,
            in place of all choices
    """
    parts = (Policy, Method, SelfDistillation, RolloutDataModule)
    unknown = arguments.keys() - {name for part in parts for name in taken(part, arguments)}
    assert not unknown, f"nothing takes {sorted(unknown)}"
    choices = taken(Method, arguments)
    policy = Policy(str(folder), **taken(Policy, arguments))
    shared = {"policy": policy, "method": arguments.get("method") or Method(**choices)}
    data = RolloutDataModule(**(taken(RolloutDataModule, arguments) | shared))
    module = kind(**(taken(SelfDistillation, arguments) | shared))
    if load:
        torch.manual_seed(0)
        module.configure_model()
    return module, data
