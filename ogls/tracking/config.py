"""The resolved configuration is logged as parameters and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from ogls.tracking.tracker import Tracker

_NOT_PARAMETERS = ("trainer.logger", "trainer.callbacks", "config")


class SaveConfig(SaveConfigCallback):
    """SaveConfig hands the resolved configuration to the tracker, where Lightning's own callback writes to a folder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Does nothing, since only the checkpoint, which is read later, says which run goes on."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "test")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.logger, Tracker):
            text = self.parser.dump(self.config, skip_none=False)
            leaves = flatten(yaml.safe_load(text))
            kept = {name: value for name, value in leaves.items() if not name.startswith(_NOT_PARAMETERS)}
            trainer.logger.log_config(text, kept)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a configuration by dotted name.

    `k: {class_path: a.B, init_args: {x: 1}}` becomes `k: B` and `k.x: 1`.
    """
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and "class_path" in value:
            leaves[name] = str(value["class_path"]).rpartition(".")[2]
            value = value.get("init_args") or {}
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves
