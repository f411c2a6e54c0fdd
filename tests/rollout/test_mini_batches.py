"""Several updates per batch of rollouts, held against a plain fp32 loop; and groups that are drawn again."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import Logger
from transformers import AutoModelForCausalLM

from ogls.lessons.advantage import GroupRelative
from ogls.loss import policy_gradient
from ogls.methods import GRPO, OGLS_SD, OPSD, ROSD
from ogls.records import Batch, Completion, Sampling
from ogls.rollout.mini_batches import divided
from tests.scripted import ChainEngine
from tests.test_module import SaveAt, fit, pair, weights
from tests.tiny import group

DAPO = GRPO(
    objective=policy_gradient.GRPO(clip_low=0.2, clip_high=0.28), advantage=GroupRelative(std=False)
)  # as qwen3_grpo.yaml has it


class Scored(ChainEngine):
    """Works chains, and gives every token the log-probability that the policy has for it at that time."""

    def _load(self, policy: Any) -> None:
        self.policy = policy

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        said = super()._generate(prompts, sampling, n, seed)
        return [[self._scored(prompt, one) for one in row] for prompt, row in zip(prompts, said, strict=True)]

    @torch.no_grad()
    def _scored(self, prompt: Sequence[int], said: Completion) -> Completion:
        states = self.policy.hidden([prompt], [said.token_ids], [0])
        logp = (states @ self.policy.head[0].T).log_softmax(-1)
        values = logp[range(len(said.token_ids)), list(said.token_ids)]
        return Completion(token_ids=said.token_ids, logprobs=tuple(values.tolist()), finish_reason=said.finish_reason)


def grpo(folder: Path, **arguments: Any) -> tuple[Any, Any, list[Batch], list[dict[str, float]]]:
    """A module and its data, with the batches that are sampled and the metrics that are logged."""
    settings = {"method": DAPO, "engine": Scored(), "group_size": 6, "lora": None, "locator": None}
    settings |= {"problems_per_step": 2, "steps_per_epoch": 3, "mini_batches": 3, "learning_rate": 5e-3}
    model, data = pair(folder, **(settings | arguments))
    sampled: list[Batch] = []
    logged: list[dict[str, float]] = []
    make, log = data.make_batch, model.log_dict

    def keep(step: int) -> Batch:
        sampled.append(make(step))
        return sampled[-1]

    def note(values: dict[str, float], **options: Any) -> None:
        logged.append(values)
        log(values, **options)

    data.make_batch = keep  # pyright: ignore[reportAttributeAccessIssue]
    model.log_dict = note  # pyright: ignore[reportAttributeAccessIssue]
    return model, data, sampled, logged


class Rows(Logger):
    """What a logger is told."""

    name, version = "rows", "0"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def attached(self) -> Callback:
        """Returns a callback that gives it to a trainer."""

        def attach(trainer: Trainer, *_: Any, **__: Any) -> None:
            trainer.loggers, trainer.log_every_n_steps = [self], 1

        return LambdaCallback(setup=attach)


def plain_updates(
    folder: Path, batch: Batch, names: Sequence[str], rate: float
) -> tuple[list[float], Any, list[float]]:
    """Losses, weights and share of clipped tokens of one pass over three mini-batches of two groups each."""
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, p in net.named_parameters():
        p.requires_grad_(name in names)
    trained = [p for _, p in net.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses, ratios = [], []
    for part in range(3):
        terms, seen = [], []
        for each in batch.groups[2 * part : 2 * part + 2]:
            rewards = [float(rollout.verdict.correct) for rollout in each.rollouts]
            mean = sum(rewards) / len(rewards)
            for rollout, reward in zip(each.rollouts, rewards, strict=True):
                if mean in (0.0, 1.0):
                    continue
                ids = list(rollout.completion.token_ids)
                logits = net(torch.tensor([[*each.prompt_ids, *ids]])).logits[0, len(each.prompt_ids) - 1 : -1]
                logp = logits.log_softmax(-1)[range(len(ids)), ids]
                ratio = (logp - torch.tensor(rollout.completion.logprobs)).exp()
                gain = torch.minimum(ratio * (reward - mean), ratio.clamp(0.8, 1.28) * (reward - mean))
                terms.append(-gain.mean())
                seen += ratio.tolist()
        assert terms, "a mini-batch without a mixed group tests nothing"
        optimizer.zero_grad()
        loss = torch.stack(terms).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        ratios.append(max(abs(ratio - 1) for ratio in seen))
    return losses, dict(net.named_parameters()), ratios


def test_each_mini_batch_makes_an_update_with_ratios_to_what_sampled_it(tiny_model: Path, tmp_path: Path):
    model, data, sampled, logged = grpo(tiny_model)
    rows = Rows()
    fit(tmp_path, model, data, callbacks=[rows.attached()])
    (batch,) = sampled
    assert len(batch.groups) == 6
    losses, expected, ratios = plain_updates(tiny_model, batch, list(weights(model)), rate=5e-3)
    assert ratios[0] < 1e-4 < 0.05 < min(ratios[1:]), "the second and third mini-batch are off-policy"
    assert [row["train/loss"] for row in logged] == pytest.approx(losses, rel=1e-3, abs=1e-6)
    start = dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).named_parameters())
    for name, value in weights(model).items():  # AdamW makes much of a gradient near 0, whose sign is rounding
        off, moved = (value - expected[name]).abs().mean(), (expected[name] - start[name]).abs().mean()
        assert off < 0.01 * moved, name
    assert [row["train/staleness"] for row in logged] == [0, 1, 2]
    assert [row["train/lessons"] for row in logged] == [
        sum(len(each.rollouts) for each in batch.groups[2 * part : 2 * part + 2] if each.mixed) for part in range(3)
    ]
    assert [step for step, _ in rows.rows] == [1, 2, 3]
    assert [row["train/loss"] for _, row in rows.rows] == [row["train/loss"] for row in logged]
    for name in ("time/generate", "train/dropped_unlocated"):  # of the whole batch
        assert [name in row for _, row in rows.rows] == [True, False, False], "no logger has it again"


def test_a_run_goes_on_bitwise_amid_its_mini_batches(tiny_model: Path, tmp_path: Path):
    file = tmp_path / "step4.ckpt"
    model, data, sampled, _ = grpo(tiny_model)
    expected = fit(tmp_path, model, data, epochs=2, callbacks=[SaveAt(4, file)])
    again, data, made_again, _ = grpo(tiny_model)
    assert fit(tmp_path, again, data, epochs=2, ckpt_path=file) == expected[4:]
    assert made_again == [
        Batch(
            lessons=sampled[1].lessons,
            policy_version=3,
            groups=sampled[1].groups,
            metrics=made_again[0].metrics,
            phases=made_again[0].phases,
        )
    ], "from the weights of update 3, not of update 4"
    for name, value in weights(model).items():
        assert torch.equal(weights(again)[name], value), name


def test_parts_are_what_the_whole_is():
    groups = tuple(group(i, i % 2 == 0) for i in range(5))
    whole = Batch(lessons=(), policy_version=3, groups=groups, metrics={"train/dropped": 2, "time/generate": 1.0})
    parts = divided(whole, 2)
    assert [len(part.groups) for part in parts] == [2, 3]
    assert [part.metrics["train/accuracy"] for part in parts] == [0.5, pytest.approx(2 / 3)]
    assert [part.metrics.get("train/dropped") for part in parts] == [2, None]
    assert [part.metrics.get("time/generate") for part in parts] == [1.0, None]
    assert divided(whole, 1) == [whole]
    twice = divided(whole, 2, passes=2)
    assert twice == [*parts, replace(parts[0], metrics=twice[2].metrics, phases=()), parts[1]]
    assert twice[2].metrics == {name: value for name, value in parts[0].metrics.items() if name not in whole.metrics}


@pytest.mark.parametrize("name", ["mini_batches", "updates_per_rollout"])
def test_stale_rollouts_need_a_ratio(name: str, tiny_model: Path):
    with pytest.raises(ValueError, match=f"data.{name} is 2, so rollouts are off-policy for Distillation"):
        pair(tiny_model, **{name: 2})


# ---- refill ----


class Sure(ChainEngine):
    """Is right about every problem but those whose text has an odd length, of which it solves every other rollout."""

    def _work(self, prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
        self.slips = 0.0 if len(prompt) % 2 else rng.choice((0.0, 1.0))
        return super()._work(prompt, rng)


@pytest.mark.parametrize("draws", [0, 1, 20])
def test_groups_that_teach_nothing_are_drawn_again(draws: int, tiny_model: Path, tmp_path: Path):
    model, data, sampled, logged = grpo(
        tiny_model, engine=Sure(), mini_batches=1, problems_per_step=6, steps_per_epoch=2, refill_draws=draws
    )
    fit(tmp_path, model, data)
    again = grpo(tiny_model, engine=Sure(), mini_batches=1, problems_per_step=6, steps_per_epoch=2, refill_draws=draws)
    fit(tmp_path, again[0], again[1])
    assert [batch.groups for batch in again[2]] == [batch.groups for batch in sampled], "by seed and step alone"
    for batch, row in zip(sampled, logged, strict=True):
        silent = sum(not each.mixed for each in batch.groups)
        assert len(batch.groups) == 6
        if draws == 0:
            assert silent
            assert "train/groups_refilled" not in row
        else:
            assert row["train/groups_silent"] == silent
            assert row["train/groups_refilled"] > 0
            assert data.engine.calls <= 2 * (1 + draws)
        assert row["train/mixed_groups"] < 1, "rates are of the first draw"
    if draws == 20:
        assert sum(not each.mixed for batch in sampled for each in batch.groups) == 0


def test_what_teaches_is_what_the_method_learns_from():
    right, wrong = group(0, True), group(1, False)
    assert not GRPO().teaches(right)
    assert not GRPO().teaches(wrong)
    assert not ROSD().teaches(wrong)
    assert not OGLS_SD().teaches(wrong), "no reference solution to contrast with"
    assert not OPSD().teaches(right), "no solution to read"
