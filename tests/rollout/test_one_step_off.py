"""Which weights sampled what, when batches are made one step ahead; and a step on such a batch by the formula."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from ogls.cli import build
from ogls.data import RolloutDataModule
from ogls.lessons.privilege import Demonstration, ReferenceSolution
from ogls.lessons.reflection.model import ModelReflector
from ogls.lessons.selection import AllTokens
from ogls.loss.divergence import ReverseKL
from ogls.loss.objective import Distillation, Likelihood
from ogls.loss.steering import Unsteered
from ogls.module import SelfDistillation
from ogls.policy.policy import Policy
from ogls.records import Batch, Completion, Sampling
from ogls.rollout.accuracy import Evaluation
from ogls.rollout.engine import RolloutEngine
from ogls.rollout.one_step_off import OneStepOff
from ogls.rollout.process import EngineProcess
from ogls.rollout.sampler import Sampler
from ogls.rollout.transformers import TransformersEngine
from ogls.system.exits import EngineFailed
from tests.scripted import ChainEngine
from tests.test_module import SaveAt, fit, pair, trainer, weights


class Copying(TransformersEngine):
    """Samples from a copy of the policy, so it can run beside the training; fails on command."""

    copies_policy = True

    def __init__(self, fault: str = "", at: int = -1) -> None:
        super().__init__()
        self.calls: list[tuple[int, str]] = []  # version, thread
        self.fault, self.at = fault, at

    def _load(self, policy: Policy) -> None:
        made = Policy(policy.name, lora=policy.lora, dtype="float32").load()
        made.load_trainable({name: p.detach() for name, p in policy.trainable().items()})
        super()._load(made)

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        if n > 1:  # neither a canary nor a validation
            self.calls.append((self.version, threading.current_thread().name))
            if len(self.calls) - 1 == self.at:
                threading.Event().wait(600 if self.fault == "hang" else 0)
                raise RuntimeError("the engine died, as it was told to")
        return super()._generate(prompts, sampling, n, seed)


@pytest.fixture(autouse=True)
def _engine_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ogls.data.EngineProcess", lambda engine: engine)


def stale(folder: Path, engine: RolloutEngine, **arguments: Any) -> tuple[SelfDistillation, RolloutDataModule]:
    """A run whose rollouts are learned from whatever their verdict."""
    settings: dict[str, Any] = {
        "engine": engine,
        "one_step_off": True,
        "privilege": ReferenceSolution(),
        "steering": Unsteered(),
        "objective": Distillation(importance_cap=1.1),
        "selection": AllTokens(),
        "max_tokens": 12,
        "evaluation": Evaluation(samples=1, sampling=Sampling(max_tokens=12)),
        "learning_rate": 1e-2,
        "schedule": "linear",
    }
    return pair(folder, **(settings | arguments))


class Watch(Callback):
    """The weights that each step begins with, its batch, and what it logged."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.batches: list[Batch] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.weights.append(weights(pl_module))
        self.batches.append(batch)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_every_batch_was_sampled_by_the_weights_of_one_update_ago(tiny_model: Path, tmp_path: Path) -> None:
    engine, watch = Copying(), Watch()
    model, data = stale(tiny_model, engine)
    made = trainer(tmp_path, epochs=3, callbacks=[watch])
    made.limit_val_batches = 1.0  # after steps 2, 4 and 6
    made.fit(model, data)
    data.close()
    assert [batch.policy_version for batch in watch.batches] == [0, 0, 1, 2, 3, 4]
    assert {g.policy_version for g in watch.batches[4].groups} == {3}
    assert [m["train/staleness"] for m in watch.metrics] == [0, 1, 1, 1, 1, 1]
    versions = [version for version, _ in engine.calls]
    assert versions == [0, 0, 1, 2, 3, 4]  # none after the last: nobody would learn from it
    assert engine.calls[0][1] == "MainThread"
    assert [thread for _, thread in engine.calls[1:]] == [f"ogls-batch-{step}" for step in range(1, 6)]
    assert all("time/wait" in m and "time/sync" in m for m in watch.metrics[1:-1])

    for step, batch in enumerate(watch.batches):  # whatever they are called: by the log-probs
        before = max(0, step - 1)
        assert gap(model.policy, watch.weights[before], batch) < 1e-4
        assert all(gap(model.policy, watch.weights[v], batch) > 1e-3 for v in range(6) if v not in (before, 0))


def gap(policy: Policy, of: dict[str, Tensor], batch: Batch) -> float:
    """Mean |log-prob by the engine - log-prob by these weights| of the sampled tokens."""
    worst = 0.0
    with torch.no_grad(), policy.swapped(of):
        for group in batch.groups:
            for rollout in group.rollouts:
                ids = rollout.completion.token_ids
                states = policy.hidden([group.prompt_ids], [ids], [0])
                logprobs = (states @ policy.head[0].T).log_softmax(-1)[range(len(ids)), list(ids)]
                worst = max(worst, float((logprobs - torch.tensor(rollout.completion.logprobs)).abs().mean()))
    return worst


def test_the_corrected_loss_by_the_formula(tiny_model: Path, tmp_path: Path) -> None:
    """sum w min(pi / pi_sampler, cap) KL(teacher || pi) / sum w from full logits; pi has made one update more."""
    watch = Watch()
    model, data = stale(tiny_model, Copying())
    losses = fit(tmp_path, model, data, callbacks=[watch], epochs=2)
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    total = count = 0.0
    ratios = []
    for lesson in watch.batches[2].lessons:
        ids = list(lesson.token_ids)
        (view,) = (view for view in lesson.views if view.role == "success")
        with torch.no_grad():
            at_start = start(torch.tensor([[*view.prefix_ids, *ids]])).logits[0].double()
            with model.policy.swapped(watch.weights[2]):
                now = model.policy.model(torch.tensor([[*lesson.prompt_ids, *ids]])).logits[0].double()
        teacher = at_start[len(view.prefix_ids) - 1 : -1].log_softmax(-1)
        student = now[len(lesson.prompt_ids) - 1 : -1].log_softmax(-1)
        assert lesson.logprobs is not None
        ratio = (student[range(len(ids)), ids] - torch.tensor(lesson.logprobs)).exp()
        ratios += ratio.tolist()
        kl = (teacher.exp() * (teacher - student)).sum(-1)
        total += float((torch.tensor(lesson.token_weights) * ratio.clamp(max=1.1) * kl).sum())
        count += sum(lesson.token_weights)
    assert min(ratios) < 0.9 < 1.1 < max(ratios)
    assert losses[2] == pytest.approx(total / count, rel=1e-4)


def test_a_run_that_ends_before_its_engine_is_up_keeps_the_weights_of_the_batch_to_come(tiny_model: Path) -> None:
    _, data = stale(tiny_model, Copying())
    kept = {"a": torch.ones(2)}
    data.load_state_dict({"weights": kept})
    assert torch.equal(data.state_dict()["weights"]["a"], kept["a"])
    data.one_step_off = False  # as a run goes on that was allowed to change this
    assert data.state_dict() == {}, "nothing makes a batch from them any more"


@pytest.mark.parametrize("step", [3, 4], ids=["mid-epoch", "end of an epoch"])
def test_a_run_goes_on_bitwise(tiny_model: Path, tmp_path: Path, step: int) -> None:
    file, engine = tmp_path / "kept.ckpt", Copying()
    whole, data = stale(tiny_model, Copying())
    expected = fit(tmp_path, whole, data, epochs=3, callbacks=[SaveAt(step, file)])
    resumed, data = stale(tiny_model, engine)
    got = fit(tmp_path, resumed, data, epochs=3, ckpt_path=file)
    assert got == expected[step:]
    assert [version for version, _ in engine.calls] == list(range(step - 1, 5))
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param("die", "RuntimeError: the engine died", marks=pytest.mark.fault("engine dies")),
        pytest.param("hang", "TimeExpired: sampling beside the training", marks=pytest.mark.fault("engine hangs")),
    ],
)
def test_an_engine_that_fails_beside_the_training_changes_nothing(
    tiny_model: Path,
    tmp_path: Path,
    fault: str,
    said: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ogls.rollout.one_step_off.PATIENCE", 8.0 if fault == "hang" else 600.0)
    expected = fit(tmp_path, *stale(tiny_model, Copying()), epochs=2)
    engine = Copying(fault, at=2)
    assert fit(tmp_path, *stale(tiny_model, engine), epochs=2) == expected
    assert [version for version, _ in engine.calls] == [0, 0, 1, 1, 2]
    assert engine.calls[3][1] == "MainThread"  # from the weights that were kept
    assert f"is rebuilt: {said}" in capfd.readouterr().err


def test_weights_that_could_not_be_handed_over_leave_those_of_the_batch_in_the_checkpoint() -> None:
    """The next batch is then made again, after a resumption, from the weights that it had been made from."""

    class OneWeight(Policy):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.version = 0
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def trainable(self) -> dict[str, Any]:
            return {"weight": self.weight}

    class Failing(Sampler):
        beats = 0

        def __init__(self, policy: Policy) -> None:
            self.version, self._policy = 0, policy

        def hold(self) -> None:
            if self._policy.version == 2:
                raise EngineFailed("it was told to")
            self.version = self._policy.version

        def beside(self) -> Failing:
            return self

    def make(step: int, sampler: Sampler) -> Batch:
        assert isinstance(sampler, Failing)
        return Batch(lessons=(), policy_version=sampler.version)

    policy = OneWeight()
    stream = OneStepOff(make, Failing(policy), policy)
    for _ in range(2):
        stream.take(more=True)
        policy.weight.data += 1.0
        policy.version += 1
    with pytest.raises(EngineFailed):
        stream.take(more=True)
    assert stream.weights == {"weight": torch.tensor([1.0])}, "those that made the batch of step 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"updates_per_rollout": 2}, "makes every batch anew: data.updates_per_rollout is 2"),
        (
            {"privilege": Demonstration(), "objective": Likelihood()},
            r"Method\[.*Demonstration.*\] samples nothing ahead: set data.one_step_off to false",
        ),
        ({"reflector": ModelReflector(weights="frozen")}, "set method.reflector.weights to student"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(tiny_model: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stale(tiny_model, ChainEngine(), **arguments)


def test_stale_rollouts_need_a_correction(tiny_model: Path) -> None:
    message = "one_step_off is True, .* off-policy for Distillation: give each .* an importance_cap, or .* to false"
    with pytest.raises(ValueError, match=message):
        stale(tiny_model, ChainEngine(), objective=Distillation())


def test_the_overlay_builds_on_vllm_and_is_refused_where_the_policy_itself_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ogls.data.EngineProcess", EngineProcess)
    monkeypatch.setattr("sys.argv", ["run.py"])
    built = build(["--config", "math.yaml", "--config", "one_step_off.yaml", "--trainer.accelerator", "cpu"], run=False)
    assert isinstance(built.datamodule.engine, EngineProcess)
    assert built.model.method is built.datamodule.method
    assert built.model.method.objective == Distillation(ReverseKL(), importance_cap=2.0)
    assert built.model.method.uncorrected == ()
    built.datamodule.close()
    with pytest.raises(ValueError, match="TransformersEngine samples with the policy itself and cannot run beside"):
        EngineProcess(TransformersEngine())
