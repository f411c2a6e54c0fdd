"""What an update does beside the gradient: clipping, learning rates, the moving teacher, seeds of the draws."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from ogls.lessons.reflection.reflector import ReflectionCase, ReflectionContext, Reflector
from ogls.policy.teacher import EMA
from ogls.records import Completion, Reflection, Sampling
from tests.faults import small
from tests.scripted import ChainEngine
from tests.test_module import fit, pair


class Watch(Callback):
    """The size of the gradient that the optimiser gets, and the learning rate that it has."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("constant", 2, [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", 0, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 1, [1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", 1, [1.0, 1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4]),
        ("linear", 3, [1 / 3, 2 / 3, 1.0, 1.0, 0.5]),
    ],
)
def test_learning_rates_by_table(
    schedule: str, warmup: int, expected: list[float], tiny_model: Path, tmp_path: Path
) -> None:
    watch, further = Watch(), {"steps_per_epoch": 5, "problems_per_step": 1}
    made = pair(tiny_model, learning_rate=1e-3, schedule=schedule, warmup_steps=warmup, **further)
    fit(tmp_path, *made, callbacks=[watch])
    assert watch.rates == pytest.approx([1e-3 * factor for factor in expected], rel=1e-9)


def test_the_optimiser_gets_a_clipped_gradient(tiny_model: Path, tmp_path: Path) -> None:
    free, bound = Watch(), Watch()
    fit(tmp_path, *pair(tiny_model, max_grad_norm=None, steps_per_epoch=1), callbacks=[free])
    (norm,) = free.norms
    logged: list[float] = []
    model, data = pair(tiny_model, max_grad_norm=norm / 4, steps_per_epoch=1)
    keep = model.log_dict
    model.log_dict = lambda values, **options: (logged.append(values["train/grad_norm"]), keep(values, **options))  # pyright: ignore
    fit(tmp_path, model, data, callbacks=[bound])
    assert bound.norms == pytest.approx([norm / 4], rel=1e-4)
    assert logged == pytest.approx([norm], rel=1e-4), "what is logged is the norm before it is clipped"


class Kept(Callback):
    """What the teacher keeps after every step; the gradient of step `poisoned` is no number."""

    def __init__(self, poisoned: int) -> None:
        self.poisoned, self.kept = poisoned, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        weight = next(iter(pl_module.policy.trainable().values()))
        if trainer.global_step == self.poisoned:
            weight.register_hook(lambda gradient: gradient * float("nan"))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.kept.append({name: value.clone() for name, value in pl_module._kept["teacher"].items()})


def test_a_skipped_step_does_not_move_the_teacher(tiny_model: Path, tmp_path: Path) -> None:
    watch = Kept(poisoned=2)
    fit(tmp_path, *pair(tiny_model, teacher=EMA(0.5), steps_per_epoch=3), callbacks=[watch])
    first, second, third = watch.kept
    assert any(not torch.equal(first[name], second[name]) for name in first), "the teacher follows a student that moves"
    for name, value in second.items():
        torch.testing.assert_close(third[name], value, rtol=0, atol=0)


class Seeded(ChainEngine):
    """Keeps the seeds that it is asked with, by the number of prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[tuple[int, int]] = []

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        self.seeds.append((len(prompts), seed))
        return super()._generate(prompts, sampling, n, seed)


def test_every_step_draws_anew_and_every_validation_alike(tiny_model: Path, tmp_path: Path) -> None:
    engine = Seeded()
    small.fit(tiny_model, tmp_path, engine=engine, epochs=2)  # 4 steps of 3 problems each, and a validation of 4
    training = [seed for count, seed in engine.seeds if count == 3]
    validation = [seed for count, seed in engine.seeds if count == 4]
    assert len(training) == len(set(training)) == 8
    assert len(validation) == 2
    assert len(set(validation)) == 1
    assert not set(training) & set(validation)


@dataclass(frozen=True)
class Asked(Reflector):
    """Names no error, and keeps the seeds that it is given."""

    seeds: list[int] = field(default_factory=list)

    def answer(
        self, cases: Sequence[ReflectionCase], context: ReflectionContext
    ) -> tuple[list[Reflection | None], dict[str, float]]:
        self.seeds.append(context.seed)
        return [None] * len(cases), {}


def test_reflections_are_drawn_apart_from_rollouts(tiny_model: Path, tmp_path: Path) -> None:
    engine, reflector = Seeded(), Asked()
    small.fit(tiny_model, tmp_path, engine=engine, epochs=1, reflector=reflector)
    drawn = [seed for _, seed in engine.seeds]
    assert len(reflector.seeds) == len(set(reflector.seeds)) > 1
    assert not set(reflector.seeds) & set(drawn)


def test_fewer_validations_still_end_with_one(tiny_model: Path, tmp_path: Path) -> None:
    """Three epochs of four steps, a validation every second one: after the second, and after the last."""
    small.fit(tiny_model, tmp_path, epochs=3, training={"check_val_every_n_epoch": 2})
    (file,) = tmp_path.glob("small-*/metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows if "val/avg_at_2" in row] == [8, 12]
