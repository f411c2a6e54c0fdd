"""One of several processes that train together, or the only one: it leaves losses, whole weights and what it holds.

    python -m tests.sharding.ranks MODEL FOLDER RANK SIZE PORT [CASE] [SETTING=JSON ...]

CASE is a name of `CASES`, or of a method as published. Settings are those of `tests.pair`, and `goes_on` and `save` for
a checkpoint in FOLDER; `sincere` has what fails in the engine of each rank, `validates` counts batches before training.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from ogls import methods
from ogls.algorithm import MicroBatch
from ogls.callbacks.checkpoint_io import SoundCheckpoints
from ogls.lessons.advantage import GroupRelative
from ogls.lessons.prompts import Prompts
from ogls.lessons.reflection.reflector import ReflectionLimits
from ogls.loss.objective import Distillation, Mixture, ReferenceKL
from ogls.loss.policy_gradient import GRPO
from ogls.module import SelfDistillation
from ogls.policy.lora import Lora
from ogls.policy.pretrained import load_tokenizer
from ogls.policy.sharding import on_first, own_part
from ogls.policy.teacher import EMA, Frozen, Live, OtherModel, TrustRegion
from ogls.sharded import Sharded
from ogls.system.exits import RunEnded
from ogls.system.step_metrics import StepMetrics
from tests.faults import small
from tests.sharding.sincere import Sincere
from tests.test_overlays import REFLECTED, reflecting

STEPS = 8
CHECKPOINT = "step.ckpt"
FULL: dict[str, Any] = {"lora": None, "learning_rate": 1e-5, "schedule": "constant"}
LORA: dict[str, Any] = FULL | {"lora": Lora(rank=4, alpha=8)}
MIXED: dict[str, Any] = {
    "advantage": GroupRelative(),
    "objective": Mixture([GRPO(), Distillation(), ReferenceKL()], [0.5, 1.0, 0.04]),
}
CASES: dict[str, dict[str, Any]] = {
    "frozen": FULL | {"teacher": Frozen()},
    "live": FULL | {"teacher": Live()},
    "ema": FULL | {"teacher": EMA(0.5)},
    "region": FULL | {"teacher": TrustRegion(0.3)},
    "mixture": FULL | MIXED | {"teacher": EMA(0.9)},
    "checkpointing": FULL | {"teacher": Frozen(), "gradient_checkpointing": True},
    "bfloat16": FULL | {"teacher": Frozen(), "dtype": "bfloat16"},
    "embeddings": FULL | {"teacher": EMA(0.5), "train_embeddings": True},
    "embeddings bfloat16": FULL | {"teacher": Frozen(), "train_embeddings": True, "dtype": "bfloat16"},
    "other model": FULL,
    "lora": LORA | {"teacher": Frozen()},
    "lora ema": LORA | {"teacher": EMA(0.5)},
    "lora mixture": LORA | MIXED | {"teacher": TrustRegion(0.3)},
    "lora bfloat16": LORA | {"teacher": Frozen(), "dtype": "bfloat16", "gradient_checkpointing": True},
}


class Seeded(SelfDistillation):
    """Makes the same adapter in every process, one of which has no memory for micro-batches above `room` tokens.

    It runs out where a loss is made, in a layer of the student or of another model, or in a layer's gradient.
    """

    room: int | None = None
    where: str = "loss"

    def configure_model(self) -> None:
        torch.manual_seed(0)
        super().configure_model()
        reader = self.other if self.where == "other" and self.other is not None else self.policy
        if self.where in ("layer", "other"):
            reader.model.base_model.layers[1].mlp.register_forward_pre_hook(lambda *_: self._run_out())
        if self.where == "gradient":
            self.policy.model.base_model.layers[1].mlp.register_full_backward_hook(lambda *_: self._run_out())

    def _run_out(self) -> None:
        if self.room is not None and self.tokens_per_micro_batch > self.room and self.global_rank == 1:
            raise torch.OutOfMemoryError("injected into one process alone")

    def _observe(self, metrics: StepMetrics, batch: MicroBatch) -> None:
        super()._observe(metrics, batch)
        if self.where == "loss":
            self._run_out()


class Told(Callback):
    """What every step said."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        names = ("train/loss", "train/grad_norm", "train/skipped")
        self.rows.append({name: float(trainer.callback_metrics[name]) for name in names})


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action()


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes that this process holds of them."""
    return sum(own_part(t).numel() * t.element_size() for t in tensors if t is not None)


def held(student: SelfDistillation, trainer: Trainer) -> dict[str, int]:
    """Bytes that this process holds, by what they are for."""
    parameters = list(student.policy.parameters())
    other = [] if student.other is None else student.other.parameters()
    states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    return {
        "weights": nbytes(parameters),
        "gradients": nbytes(p.grad for p in parameters),
        "Adam": nbytes(state for state in states if state.ndim),
        "teacher": nbytes([*other, *(value for kept in student._kept.values() for value in kept.values())]),
    }


def launched(rank: int, size: int, port: int) -> None:
    """Sets what torchrun sets."""
    told = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0}
    told |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in told.items()}


def train(model: str, folder: str, rank: str, size: str, port: str, case: str, *settings: str) -> None:
    """Trains as one of `size` processes; with size 1 as any run does."""
    changes = {name: json.loads(value) for name, _, value in (setting.partition("=") for setting in settings)}
    goes_on, save = changes.pop("goes_on", False), changes.pop("save", False)
    steps, killed = changes.pop("steps", STEPS), changes.pop("killed", None)
    room, where = changes.pop("room", None), changes.pop("where", "loss")
    place, told = Path(folder), Told()
    sincere, validates = changes.pop("sincere", None), changes.pop("validates", 0)
    strategy = {"strategy": changes.pop("strategy", None) or Sharded(), "devices": int(size)} if int(size) > 1 else {}
    if strategy:
        launched(int(rank), int(size), int(port))
    given: dict[str, Any] = {
        "problems_per_step": 5,
        "group_size": 3,
        "steps_per_epoch": steps,
        "tokens_per_micro_batch": 150,
    }
    if not load_tokenizer(Path(model)).chat_template:  # the lab's
        given["prompts"] = Prompts(chat=False, student="{problem}", views={"attempt": "{problem}\nNot {text}?\n"})
    if case in methods.__all__:
        given |= {"method": getattr(methods, case)(), "engine": reflecting(Path(model)), "prompts": REFLECTED}
        given |= {"reflection": ReflectionLimits(prompt_tokens=600, max_tokens=100), "group_size": 4}
    if sincere is not None:
        given["engine"] = Sincere(Path(model), **sincere.get(rank, {}))
    if case == "other model":
        changes["teacher"] = OtherModel(model)
    student, data = small.pair(Path(model), kind=Seeded, load=False, **(given | CASES.get(case, FULL) | changes))
    assert isinstance(student, Seeded)
    student.room, student.where = room, where
    trainer = Trainer(
        max_epochs=2 if goes_on else 1,
        accelerator="cpu",
        logger=False,
        callbacks=[told, *([At(2, lambda: os.kill(os.getpid(), 9))] if killed == int(rank) else [])],
        plugins=[SoundCheckpoints()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=validates,
        limit_val_batches=validates,
        **strategy,
    )
    try:
        trainer.fit(student, data, ckpt_path=place / CHECKPOINT if goes_on else None)
        found = {"rows": told.rows, "held": held(student, trainer), "tokens": student.tokens_per_micro_batch}
        if isinstance(data.engine, Sincere):
            found["engine"] = data.engine.events
        (place / f"told-{rank}.json").write_text(json.dumps(found))
        weights = on_first(student.policy.trainable())
        if int(rank) == 0:
            torch.save({name: p.detach() for name, p in weights.items()}, place / "weights.pt")
            torch.save(dict(student.policy.merged_weights()), place / "merged.pt")
        else:
            list(student.policy.merged_weights())
        if save:
            trainer.save_checkpoint(place / CHECKPOINT)
    except RunEnded as error:
        (place / f"ended-{rank}.txt").write_text(str(error))
        raise
    finally:
        data.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(*sys.argv[1:])
