"""Weights are cut among processes, each of which keeps its rows of every weight (FSDP2).

A pass gathers the weights of one layer at a time, so that all processes make each pass together. What a process keeps
of a weight is a DTensor: gradients, the optimiser's means and a teacher's weights are cut as the weight is.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

_M_MMAP_THRESHOLD = -3  # of malloc.h; once it is set, it does not grow

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ogls.policy.policy import Policy


def shard(policy: Policy, mesh: DeviceMesh, passes: tuple[str, ...], dtype: torch.dtype | None) -> None:
    """Cuts the weights of a policy among the processes of a mesh; its gradients are then sums over the processes.

    Args:
        policy: policy whose layers are cut one by one, and then what is left: embeddings, last norm and output head
        mesh: processes, in one dimension
        passes: names of the policy's methods that run the model
        dtype: dtype in which trained weights are gathered; None is their own
    """
    precision = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
    for part in (*policy.model.base_model.layers, policy):
        fully_shard(part, mesh=mesh, mp_policy=precision)
    for name in passes:
        register_fsdp_forward_method(policy, name)
    for part in policy.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # the loss is divided by the total of all processes already
            part.set_force_sum_reduction_for_comms(True)  # else gloo would be asked for a product it does not know


def outlast(layers: Iterable[nn.Module], noted: Callable[[Exception], bool]) -> None:
    """Has a layer hand on its input where it fails, so that a pass which others are in, too, is made to its end.

    Args:
        layers: layers whose first input and whose output are states of one shape
        noted: whether an exception is made a note of; any other is raised
    """

    def lasting(forward: Callable[..., Tensor], states: Tensor, *args: Any, **options: Any) -> Tensor:
        try:
            return forward(states, *args, **options)
        except Exception as error:
            if not noted(error):
                raise
        return states

    for layer in layers:
        layer.forward = partial(lasting, layer.forward)


def give_memory_back() -> None:
    """Has glibc give large blocks back to the system when they are free.

    It would keep each layer that a pass has gathered on a processor, in pieces between which the next one has no room.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def cut(value: Tensor, like: Tensor) -> Tensor:
    """Returns this process's rows of a whole tensor, cut as `like` is; where `like` is whole, the tensor as it is."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    mesh, local = like.device_mesh, like.to_local()
    first = mesh.get_local_rank() * -(-len(value) // mesh.size())
    own = value[first : first + len(local)].to(local.device, copy=True)
    return DTensor.from_local(own, mesh, like.placements, run_check=False, shape=value.shape, stride=like.stride())


def own_part(value: Tensor) -> Tensor:
    """Returns what this process holds of a tensor; changes of it change the tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """Returns all rows of a tensor. Every process has to ask for it."""
    if not isinstance(value, DTensor):
        return value
    here: Any = value.to(value.device_mesh.device_type)  # what a batch was made from is kept in the processor's memory
    return here.full_tensor()


def on_first(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns whole tensors in the memory of the first process; in the others those are left out that were cut.

    Every process has to ask for them. One tensor is gathered at a time.
    """
    found = {}
    for name, value in values.items():
        if not isinstance(value, DTensor):
            found[name] = value
        else:
            gathered = whole(value)
            if value.device_mesh.get_rank() == 0:
                found[name] = gathered.cpu()
    return found
