"""The strategy `sharded` is Lightning's FSDP2 with this project's checkpoints.

--trainer.strategy sharded --trainer.devices 8
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from ogls.policy.sharding import cut, give_memory_back, on_first


class Sharded(ModelParallelStrategy):
    """Sharded cuts weights, gradients and optimiser into as many parts as there are processes.

    A checkpoint is one file of whole tensors, as that of one process is, so that any number of processes goes on from
    it. The optimiser's states go by the number of their weight, as torch has it.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Has all processes of all nodes share one set of weights."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        if self.root_device.type == "cpu":
            give_memory_back()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Returns False: weights are cut by then, and the run has to know what it goes on with before it begins."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Returns True: `load_optimizer_state_dict` does it, which Lightning's own strategy leaves empty."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the whole weights in the first process."""
        assert self.lightning_module is not None
        return on_first(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the whole state in the first process."""
        own = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = own.state_dict()
        return state | {"state": {number: on_first(values) for number, values in state["state"].items()}}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Has the first process write the checkpoint, while the others wait."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Returns the checkpoint in every process, as a file that is mapped into memory and not read."""
        path = Path(self.broadcast(str(checkpoint_path)))
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Gives every process its part of the weights."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives every process its part of the optimisers' states."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            states = {
                number: {name: cut(x, weights[number]) if x.ndim else x for name, x in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": states})
