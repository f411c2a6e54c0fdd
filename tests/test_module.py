"""The whole step on a tiny model in fp32, held against a computation that shares none of its code."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from transformers import AutoModelForCausalLM

from ogls.data import RolloutDataModule
from ogls.lessons.advantage import Advantage, GroupRelative
from ogls.lessons.privilege import Demonstration, PeerOutcomes, ReferenceSolution
from ogls.lessons.prompts import Prompts
from ogls.lessons.selection import UpToError
from ogls.loss.divergence import ForwardKL, JensenShannon
from ogls.loss.objective import Distillation, Likelihood, Mixture, Objective, ReferenceKL
from ogls.loss.policy_gradient import GRPO
from ogls.loss.steering import OutcomeSteering, Unsteered
from ogls.module import SelfDistillation
from ogls.policy.lora import Lora
from ogls.policy.pretrained import load_tokenizer
from ogls.policy.teacher import EMA, Frozen, Live, Teacher
from ogls.records import Batch, Phase, Sampling
from ogls.rollout.accuracy import Evaluation
from ogls.tasks.chains import Chain, ChainErrors, Chains
from tests.pair import make_pair
from tests.scripted import ScriptedEngine


def pair(folder: Path, **arguments: Any) -> tuple[SelfDistillation, RolloutDataModule]:
    """A module and its data, in seconds a run; `arguments` go to policy, method, module and data by their names."""
    tokenizer = load_tokenizer(folder)

    def work(prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
        text = Chain.parse(tokenizer.decode(prompt)).work(rng, 0.4)
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    settings: dict[str, Any] = {
        "lora": Lora(rank=4, alpha=8),
        "dtype": "float32",
        "privilege": PeerOutcomes(max_peers=2),
        "steering": OutcomeSteering(),
        "selection": UpToError(),
        "learning_rate": 1e-3,
        "train": Chains(size=30),
        "val": Chains(size=6, split="heldout"),
        "prompts": Prompts(system="", student="{problem}", views={"attempt": "{problem} Not {text}?"}),
        "engine": ScriptedEngine(work),
        "locator": ChainErrors(),
        "max_tokens": 60,
        "evaluation": Evaluation(samples=2, sampling=Sampling(max_tokens=60)),
        "group_size": 3,
        "problems_per_step": 3,
        "steps_per_epoch": 2,
        "context_length": 300,
    }
    return make_pair(folder, **(settings | arguments))


def trainer(tmp_path: Path, epochs: int = 1, **arguments: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        **arguments,
    )


def fit(
    tmp_path: Path,
    model: SelfDistillation,
    data: RolloutDataModule,
    epochs: int = 1,
    callbacks: Sequence[Callback] = (),
    ckpt_path: Path | None = None,
) -> list[float]:
    """Losses of the steps."""
    losses: list[float] = []
    log_dict = model.log_dict

    def keep(values: dict[str, float], **options: Any) -> None:
        losses.append(values["train/loss"])
        log_dict(values, **options)

    model.log_dict = keep  # pyright: ignore[reportAttributeAccessIssue]
    try:
        trainer(tmp_path, epochs, callbacks=list(callbacks)).fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    finally:
        data.close()
    return losses


def weights(model: SelfDistillation) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.policy.trainable().items()}


def dense_loss(folder: Path, batch: Batch, alpha: float) -> float:
    """OGLS-SD from full logits, one forward pass per view, by the printed formulas."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logits(prefix: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([[*prefix, *ids]])).logits[0, len(prefix) - 1 : -1].double()

    total = count = 0.0
    for lesson in batch.lessons:
        by_role = {
            role: torch.stack([logits(v.prefix_ids, lesson.token_ids) for v in lesson.views if v.role == role]).mean(0)
            for role in ("plain", "success", "failure")
        }
        target = (by_role["plain"] + alpha * (by_role["success"] - by_role["failure"])).softmax(-1)
        student = logits(lesson.prompt_ids, lesson.token_ids).softmax(-1)
        kl = (target * (target / student).log()).sum(-1)
        total += float((kl * torch.tensor(lesson.token_weights)).sum())
        count += sum(lesson.token_weights)
    return total / count


def test_the_loss_of_the_first_step_is_the_papers(tiny_model: Path, tmp_path: Path):
    model, data = pair(tiny_model, steering=OutcomeSteering(alpha=0.7))
    seen: list[Batch] = []
    make = data.make_batch

    def keep(step: int) -> Batch:
        seen.append(make(step))
        return seen[-1]

    data.make_batch = keep  # pyright: ignore[reportAttributeAccessIssue]
    losses: list[float] = []
    model.log_dict = lambda values, **_: losses.append(values["train/loss"])  # pyright: ignore
    trainer(tmp_path).fit(model, data)
    data.close()
    batch = seen[0]
    assert len(batch.lessons) >= 3
    assert losses[0] == pytest.approx(dense_loss(tiny_model, batch, alpha=0.7), rel=1e-4)


def dense_grpo(folder: Path, batch: Batch) -> float:
    """Mean over rollouts of the mean over tokens of -min(r A, clip(r, 0.8, 1.2) A), from full logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    values = []
    for lesson in batch.lessons:
        with torch.no_grad():
            logits = model(torch.tensor([[*lesson.prompt_ids, *lesson.token_ids]])).logits[0].double()
        logp = logits[len(lesson.prompt_ids) - 1 : -1].log_softmax(-1)
        ratio = (logp[range(len(lesson.token_ids)), list(lesson.token_ids)] - torch.tensor(lesson.logprobs)).exp()
        gain = torch.minimum(ratio * lesson.advantage, ratio.clamp(0.8, 1.2) * lesson.advantage)
        values.append(-gain.mean().item())
    return sum(values) / len(values)


def test_a_mixture_is_the_sum_of_both_formulas_on_one_batch(tiny_model: Path, tmp_path: Path):
    model, data = pair(
        tiny_model,
        steering=OutcomeSteering(alpha=0.7),
        objective=Mixture([GRPO(), Distillation()], [0.5, 2.0]),
        advantage=GroupRelative(),
        steps_per_epoch=1,
        problems_per_step=6,
        tokens_per_micro_batch=200,
    )
    seen: list[Batch] = []
    make = data.make_batch

    def keep(step: int) -> Batch:
        seen.append(make(step))
        return seen[-1]

    data.make_batch = keep  # pyright: ignore[reportAttributeAccessIssue]
    logged: list[dict[str, float]] = []
    model.log_dict = lambda values, **_: logged.append(values)  # pyright: ignore
    trainer(tmp_path).fit(model, data)
    data.close()
    (batch,) = seen
    reinforced = replace(batch, lessons=tuple(lesson for lesson in batch.lessons if lesson.advantage))
    distilled = replace(batch, lessons=tuple(lesson for lesson in batch.lessons if lesson.views))
    both = [lesson for lesson in batch.lessons if lesson.advantage and lesson.views]
    assert 0 < len(both) < len(reinforced.lessons)
    grpo, kl = dense_grpo(tiny_model, reinforced), dense_loss(tiny_model, distilled, alpha=0.7)
    assert logged[0]["train/loss_grpo"] == pytest.approx(grpo, rel=1e-4)
    assert logged[0]["train/loss_distillation"] == pytest.approx(kl, rel=1e-4)
    assert logged[0]["train/loss"] == pytest.approx(0.5 * grpo + 2.0 * kl, rel=1e-4)


def test_two_terms_of_one_class_have_metrics_of_their_own(tiny_model: Path, tmp_path: Path):
    objective = Mixture([Distillation(ForwardKL()), Distillation(JensenShannon(0.5))], [1.0, 3.0])
    model, data = pair(tiny_model, steering=OutcomeSteering(alpha=0.7), objective=objective, steps_per_epoch=1)
    logged: list[dict[str, float]] = []
    model.log_dict = lambda values, **_: logged.append(values)  # pyright: ignore
    trainer(tmp_path).fit(model, data)
    data.close()
    row = logged[0]
    first, second = row["train/loss_distillation"], row["train/loss_distillation_2"]
    assert row["train/loss"] == pytest.approx(first + 3.0 * second, rel=1e-6)
    assert second < 0.5 * first, "about a quarter of it"
    assert row["train/divergence_2"] < 0.5 * row["train/divergence"]


@pytest.mark.parametrize("mixed", [False, True], ids=["distillation", "mixture"])
@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_micro_batches_change_nothing(tiny_model: Path, tmp_path: Path, budget: int, mixed: bool):
    advantage = GroupRelative() if mixed else None
    objective = Mixture([GRPO(), Distillation()], [1.0, 1.0]) if mixed else Distillation()
    step = {"objective": objective, "advantage": advantage, "steps_per_epoch": 1, "problems_per_step": 4}
    whole, its_data = pair(tiny_model, **step)
    cut, own_data = pair(tiny_model, **step, tokens_per_micro_batch=budget)
    expected, got = (fit(tmp_path, *made) for made in ((whole, its_data), (cut, own_data)))
    assert got == pytest.approx(expected, rel=1e-6)
    for name, p in whole.policy.trainable().items():
        torch.testing.assert_close(cut.policy.trainable()[name].grad, p.grad, rtol=1e-4, atol=1e-6)


def test_alpha_zero_has_no_loss_and_moves_nothing(tiny_model: Path, tmp_path: Path):
    model, data = pair(tiny_model, steering=OutcomeSteering(alpha=0.0))
    before = weights(model)
    losses = fit(tmp_path, model, data)
    assert losses == [0.0, 0.0]
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_training_moves_the_student_and_neither_the_base_nor_the_frozen_teacher(tiny_model: Path, tmp_path: Path):
    model, data = pair(tiny_model)
    before, base = weights(model), {n: p.detach().clone() for n, p in model.policy.model.named_parameters()}
    fit(tmp_path, model, data)
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())
    for name, p in model.policy.model.named_parameters():
        assert p.requires_grad or torch.equal(p, base[name])


def test_distillation_brings_the_student_to_its_teacher(tiny_model: Path, tmp_path: Path):
    made = pair(tiny_model, privilege=ReferenceSolution(), steering=Unsteered(), learning_rate=1e-2)
    losses = fit(tmp_path, *made, epochs=20)
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


class SaveAt(Callback):
    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)


class Phases(Callback):
    def __init__(self) -> None:
        self.steps: list[list[Phase]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.steps.append(outputs["phases"])


def test_the_phases_of_a_step_follow_one_another(tiny_model: Path, tmp_path: Path):
    seen = Phases()
    made = pair(tiny_model, objective=Distillation(importance_cap=2.0), updates_per_rollout=2)
    fit(tmp_path, *made, callbacks=[seen])
    rollouts, training = (
        ["sync", "generate", "grade", "lessons"],
        ["student", "teacher", "student", "diagnostics", "student", "optimizer"],
    )
    first, second = ([name for name, _ in groupby(phase.name for phase in step)] for step in seen.steps)
    assert first == rollouts + training
    assert second == training  # on the same rollouts
    for number, step in enumerate(seen.steps, 1):
        assert all(phase.step == number for phase in step)
        assert all((phase.lane == "rollouts") == (phase.name in rollouts) for phase in step)
        assert all(a.start <= a.end <= b.start for a, b in pairwise(step))


def test_a_run_goes_on_bitwise_from_the_middle_of_an_epoch(tiny_model: Path, tmp_path: Path):
    file = tmp_path / "step3.ckpt"
    whole, data = pair(tiny_model, teacher=EMA(0.5), schedule="linear")
    expected = fit(tmp_path, whole, data, epochs=3, callbacks=[SaveAt(3, file)])
    resumed, data = pair(tiny_model, teacher=EMA(0.5), schedule="linear")
    assert fit(tmp_path, resumed, data, epochs=3, ckpt_path=file) == expected[3:]
    assert resumed.policy.version == whole.policy.version == 6
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    saved = torch.load(file, weights_only=True)["ogls"]
    assert (saved["policy_version"], saved["method"]) == (3, whole.method.name)
    average, again = (model.teacher.state_dict(model._kept["teacher"]) for model in (whole, resumed))
    assert average.keys() == saved["teacher"].keys() == weights(whole).keys()
    assert any(not torch.equal(saved["teacher"][name], value) for name, value in average.items())
    for name, value in average.items():
        assert torch.equal(again[name], value), name


def test_two_updates_on_the_same_rollouts_need_the_importance_ratio(tiny_model: Path, tmp_path: Path):
    message = "data.updates_per_rollout is 2, so rollouts are off-policy for Distillation: give each .* importance_cap"
    with pytest.raises(ValueError, match=message):
        pair(tiny_model, updates_per_rollout=2)
    made = pair(tiny_model, objective=Distillation(importance_cap=2.0), updates_per_rollout=2)
    losses = fit(tmp_path, *made, epochs=2)
    assert len(losses) == 4


def test_steering_and_privilege_have_to_fit(tiny_model: Path):
    with pytest.raises(ValueError, match=r"OutcomeSteering and ReferenceSolution: .* role 'failure'"):
        pair(tiny_model, privilege=ReferenceSolution())


@pytest.mark.parametrize(
    ("objective", "advantage", "complaint"),
    [
        (GRPO(), GroupRelative(), "'success'., but GRPO has no teacher: change one of them"),
        (Mixture([GRPO(), Distillation()], [1.0, 1.0]), None, "GRPO needs advantages: set method.advantage"),
        (Distillation(), GroupRelative(), "Distillation makes no use of GroupRelative: set method.advantage to null"),
        (
            Distillation(temperature=1.1, importance_cap=2.0),
            None,
            "at temperature 1.1: .* got 1.0, 1.0 and 0",
        ),
    ],
)
def test_what_an_objective_needs_has_to_be_there_and_nothing_more(
    tiny_model: Path, objective: Objective, advantage: Advantage | None, complaint: str
):
    with pytest.raises(ValueError, match=complaint):
        pair(tiny_model, objective=objective, advantage=advantage)


def test_likelihood_learns_demonstrations_without_an_engine(tiny_model: Path, tmp_path: Path):
    made = pair(tiny_model, objective=Likelihood(), privilege=Demonstration(), engine=None, learning_rate=1e-2)
    losses = fit(tmp_path, *made, epochs=8)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("teacher", "one"), [(Frozen(), True), (EMA(0.9), False)], ids=["frozen", "ema"])
def test_where_the_start_teaches_all_weights_are_kept_once(tiny_model: Path, teacher: Teacher, one: bool):
    objective = Mixture([Distillation(), ReferenceKL()], [1.0, 0.1])
    model, _ = pair(tiny_model, objective=objective, teacher=teacher, lora=None)
    model.configure_model()
    assert model._kept["start"].keys() == model.policy.trainable().keys()
    assert (model._kept["teacher"] is model._kept["start"]) == one


@pytest.mark.parametrize(
    "arguments", [{"lora": None}, {"teacher": Live()}, {"teacher": EMA(0.9)}], ids=["full", "live", "ema"]
)
def test_other_weights_teach_and_learn(tiny_model: Path, tmp_path: Path, arguments: dict[str, Any]):
    objective = Distillation(divergence=JensenShannon(0.5))
    losses = fit(tmp_path, *pair(tiny_model, objective=objective, **arguments))
    assert all(0 < loss < 0.7 for loss in losses)


def test_a_step_without_lessons_has_a_loss_of_zero(tiny_model: Path, tmp_path: Path):
    tokenizer = load_tokenizer(tiny_model)

    def right(prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
        text = Chain.parse(tokenizer.decode(prompt)).work()
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    assert fit(tmp_path, *pair(tiny_model, engine=ScriptedEngine(right))) == [0.0, 0.0]


def test_a_checkpoint_of_version_0_1_is_refused_and_says_what_reads_it(tiny_model: Path, tmp_path: Path):
    file = tmp_path / "older.ckpt"
    fit(tmp_path, *pair(tiny_model), callbacks=[SaveAt(1, file)])
    saved = torch.load(file, weights_only=True)
    assert saved["ogls"].pop("format") == 2
    torch.save(saved, file)
    model, data = pair(tiny_model)
    with pytest.raises(ValueError, match=r"was written by ogls 0\.1, .* under version 0\.1; this is version 0\.2"):
        fit(tmp_path, model, data, ckpt_path=file)
    assert model.policy.version == 0
