"""What an update does beside the gradient: clipping, learning rates, the moving teacher, seeds of the draws."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from ogls.lessons.reflection.reflector import ReflectionCase, ReflectionContext, Reflector
from ogls.policy.teacher import EMA
from ogls.records import Completion, Reflection, RolloutGroup, Sampling
from ogls.rollout.accuracy import Evaluation, Subset
from ogls.tasks.chains import Chains
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


class StopAfter(Callback):
    """Ends the process's training with an error after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            raise KeyboardInterrupt


def logged(folder: Path) -> list[dict[str, float]]:
    (file,) = folder.glob("small-*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("stopped", [False, True], ids=["", "goes on amid the last epoch"])
def test_fewer_validations_still_end_with_one(stopped: bool, tiny_model: Path, tmp_path: Path) -> None:
    """Three epochs of four steps, a validation every second one: after the second, and after the last."""
    settings: dict[str, Any] = {"epochs": 3, "training": {"check_val_every_n_epoch": 2}}
    if stopped:
        with pytest.raises(SystemExit):
            small.fit(tiny_model, tmp_path, callbacks=[StopAfter(10)], **settings)
    small.fit(tiny_model, tmp_path, goes_on=stopped, **settings)
    assert [row["step"] for row in logged(tmp_path) if "val/avg_at_2" in row] == [8, 12]


def test_a_stop_that_is_asked_for_ends_with_a_whole_validation(tiny_model: Path, tmp_path: Path) -> None:
    class Enough(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 6

    fewer = Evaluation(samples=2, sampling=Sampling(max_tokens=60), while_training=Subset(problems=2))
    small.fit(tiny_model, tmp_path, callbacks=[Enough()], evaluation=fewer)
    assert [row["step"] for row in logged(tmp_path) if "val/avg_at_2" in row] == [6]
    assert logged(tmp_path)[-1]["step"] == 6
    assert "final/avg_at_2" in logged(tmp_path)[-1]


def test_a_subset_is_validated_amid_training_and_all_at_its_end(tiny_model: Path, tmp_path: Path) -> None:
    """Of four problems the first and the third, once each; of their two rollouts at the end the first."""
    fewer = Evaluation(
        samples=2, sampling=Sampling(max_tokens=60), with_solution=True, while_training=Subset(problems=2, samples=1)
    )
    engine, watch = Seeded(), Watched()
    small.fit(tiny_model, tmp_path, engine=engine, callbacks=[watch], evaluation=fewer)
    rows = {row["step"]: row for row in logged(tmp_path) if any(name.startswith("val") for name in row)}
    kinds = {step: {name.partition("/")[0] for name in row if "/" in name} for step, row in rows.items()}
    part = {"val_subset", "val_subset_with_solution"}
    assert kinds == {4: part, 8: part, 12: part | {"val", "val_with_solution"}}
    assert all("val_subset/avg_at_1" in row and "val_subset/pass_at_2" not in row for row in rows.values())
    held_out = [problem.id for problem in Chains(size=4, split="heldout")]
    asked = [[(group.problem.id, len(group.rollouts)) for group in groups] for groups in watch.batches[::2]]
    assert asked == [[(held_out[i], 1) for i in (0, 2)]] * 2 + [[(name, 2) for name in held_out]]
    whole = watch.batches[4]
    assert rows[12]["val/avg_at_2"] == np.mean([len(group.successes) / 2 for group in whole])
    assert rows[12]["val_subset/avg_at_1"] == np.mean([whole[i].rollouts[0].correct for i in (0, 2)])
    (final,) = [row for row in logged(tmp_path) if "final/avg_at_2" in row]
    assert final["final/avg_at_2"] == rows[12]["val/avg_at_2"]
    assert not any("subset" in name for name in final)
    best = torch.load(next(tmp_path.glob("small-*/checkpoints/best.ckpt")), weights_only=True)
    scores = {step: row["val_subset/avg_at_1"] for step, row in rows.items()}
    assert best["global_step"] == max(scores, key=lambda step: scores[step])


class Watched(Callback):
    """Keeps the groups of every validation."""

    def __init__(self) -> None:
        self.batches: list[Sequence[RolloutGroup]] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.batches.append(batch)
