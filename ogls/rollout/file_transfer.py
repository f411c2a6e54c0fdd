"""This back end of vLLM's weight transfer hands weights over in a file, where there are no GPUs for NCCL.

A server has it by ``--worker-extension-cls ogls.rollout.file_transfer.Registered``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer import (
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferEngineFactory,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from ogls.rollout.weight_files import new_folder, write_weights

NAME = "ogls_file"


@dataclass
class WorkerInit(WeightTransferInitInfo):
    """A worker has nothing to prepare."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """An update names the folder that the weights are in.

    Args:
        folder: folder of safetensors
    """

    folder: str


class FromFiles(WeightTransferEngine[WorkerInit, Update]):
    """A worker reads the weights of an update from files."""

    init_info_cls, update_info_cls = WorkerInit, Update

    def init_transfer_engine(self, init_info: WorkerInit) -> None:
        """Does nothing."""

    def start_weight_update(self) -> None:
        """Prepares the model for weights in the format of a checkpoint."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Update) -> None:
        """Reads the weights; a folder without any is an error."""
        files = sorted(Path(update_info.folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no weights in {update_info.folder}")
        model: Any = self.model
        model.load_weights(_tensors(files))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Reads the weights; vLLM's own method waits for a GPU besides."""
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        """Has the model take the weights."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Does nothing."""


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                yield name, stored.get_tensor(name)


@dataclass
class TrainerInit(TrainerInitInfo):
    """A trainer needs a folder that servers see, too.

    Args:
        folder: name of the folder
    """

    backend: ClassVar[str] = NAME

    folder: str


class ToFiles(TrainerWeightTransferEngine[TrainerInit]):
    """A trainer writes its weights to a new folder, tells of it, and removes it."""

    init_info_cls = TrainerInit
    folder = ""

    @classmethod
    def trainer_init(cls, init_info: TrainerInit, *, client: Any, source: Any = None) -> ToFiles:
        """Returns the trainer's end, once the servers have theirs."""
        made = cls(client=client, source=source, is_sender=init_info.is_sender)
        made.folder = init_info.folder
        client.init_weight_transfer_engine({})
        return made

    def send_weights(self) -> None:
        """Has the servers read the weights that the source has now."""
        assert self.source is not None
        with new_folder(Path(self.folder)) as name:
            write_weights(self.source, Path(name))
            self.client.start_weight_update()
            self.client.update_weights({"folder": name})
            self.client.finish_weight_update()


class Registered:
    """This class is a reason for each of vLLM's workers to import this file."""


WeightTransferEngineFactory.register_engine(NAME, FromFiles)
WeightTransferTrainerFactory.register_engine(NAME, ToFiles)
