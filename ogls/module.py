"""The LightningModule: wraps student, teacher, steering and objective; one batch is one optimiser step."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor

from ogls.algorithm import MicroBatch, gradient, weight_totals
from ogls.loss.diagnostics import diagnose
from ogls.loss.objective import Target
from ogls.methods.base import Method
from ogls.policy.kl_to_base import kl_to_base
from ogls.policy.policy import Policy
from ogls.policy.pretrained import tokenizer_sha256
from ogls.policy.teacher import Frozen, Teacher, Weights
from ogls.records import Batch, Lesson, RolloutGroup
from ogls.rollout.accuracy import evaluate, marker_ids
from ogls.system.process_group import ProcessGroup, combined
from ogls.system.seeds import derive
from ogls.system.step_metrics import StepMetrics, timed

_MAX_HALVINGS = 3  # of the micro-batches, in a run
FORMAT = 2
"""Of checkpoints: 1 had its method in pieces, by the names of a layout that is gone."""


class SelfDistillation(LightningModule):
    """A language model that learns from itself.

        loss = sum_t w_t D(softmax(W h_student,t), softmax(W h_target,t)) / sum_t w_t,   h_target = steering(views)

    over all tokens of one optimiser step, whatever the micro-batches; with another objective, a sum of such means.
    What a step computes stands in `ogls.algorithm`.

    Args:
        policy: the student; data and engine share it
        method: what is learned, from whom, and towards which target
        learning_rate: AdamW step size
        weight_decay: AdamW decay per step, as a share of the learning rate
        betas: AdamW decay rates of the mean gradient and of the mean squared gradient
        schedule: course of the learning rate after the warm-up; linear and cosine end at 0
        warmup_steps: steps over which the learning rate rises linearly to `learning_rate`
        max_grad_norm: gradient norm above which a step is scaled down to it; null never does
        tokens_per_micro_batch: budget of prompt and completion tokens in one forward and backward pass
        kl_to_base: whether a validation measures how far the student has moved from its start, in nats per token: two
            more passes over a rollout of each problem
    """

    def __init__(
        self,
        policy: Policy,
        method: Method,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup_steps: int = 0,
        max_grad_norm: float | None = 1.0,
        tokens_per_micro_batch: int = 4096,
        kl_to_base: bool = False,
    ) -> None:
        super().__init__()
        if learning_rate <= 0:
            raise ValueError(f"model.learning_rate must be positive, got {learning_rate}")
        if tokens_per_micro_batch < 1:
            raise ValueError(f"model.tokens_per_micro_batch must be at least 1, got {tokens_per_micro_batch}")
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained, not the base weights
        self.policy, self.method = policy, method
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.schedule, self.warmup_steps, self.max_grad_norm = schedule, warmup_steps, max_grad_norm
        self.tokens_per_micro_batch, self.kl_to_base = tokens_per_micro_batch, kl_to_base
        self._kept: dict[str, Weights] = {}  # by the teachers, beside the student's weights
        self._halvings = 0

    @property
    def teacher(self) -> Teacher:
        """The method's teacher."""
        return self.method.teacher

    @property
    def steering(self) -> Any:
        """The method's steering."""
        return self.method.steering

    @property
    def reflector(self) -> Any:
        """The method's reflector; None where nobody reflects."""
        return self.method.reflector

    @property
    def teachers(self) -> dict[str, Teacher]:
        """Whose weights make a target, by `Target.weights`."""
        return {"teacher": self.teacher, "start": Frozen()}

    def configure_model(self) -> None:
        """Reads the weights, once the trainer asks for them: whatever can be wrong is found before."""
        if not self._kept:
            self.policy.load()
            asked = {"teacher", *(target.weights for target in self.method.targets)}
            self._kept = {name: self.teachers[name].start(self.policy) for name in asked}

    def configure_optimizers(self) -> Any:
        parameters = list(self.policy.trainable().values())
        optimizer = torch.optim.AdamW(
            parameters, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        total = max(1, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate(step, total))]

    def _rate(self, step: int, total: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        if self.schedule == "linear":
            return 1.0 - progress
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    # ---- one optimiser step ----

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches are text and token ids; tensors are made micro-batch by micro-batch."""
        return batch

    @property
    def group(self) -> ProcessGroup:
        """The processes that make a step together."""
        return ProcessGroup(self.trainer.global_rank, self.trainer.world_size)

    @property
    def lent(self) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """Gives the policy the weights of a teacher while it is entered, by `Target.weights`."""
        return {n: partial(self.teachers[n].applied_to, self.policy, kept) for n, kept in self._kept.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Makes one update, and returns the `phases` of its step."""
        policy, group, step = self.policy, self.group, self.policy.version
        assert step == self.trainer.global_step, (step, self.trainer.global_step)
        assert batch.policy_version <= step, (batch.policy_version, step)
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        totals = group.summed(weight_totals(self.method, batch.lessons))
        policy.train()
        metrics, loss = self._gradient(batch.lessons, totals)
        (loss,) = group.summed([loss])
        with metrics.time("optimizer"):
            parameters = list(policy.trainable().values())
            if any(totals):
                group.add_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf")).item()
            finite = math.isfinite(loss) and math.isfinite(norm)
            if not finite:
                optimizer.zero_grad()  # AdamW passes over weights without a gradient: not a bit of them changes
            optimizer.step()
            (learning_rate,) = scheduler.get_last_lr()
            scheduler.step()
            if finite:
                self.teacher.update(policy, self._kept["teacher"])
        policy.version = step + 1
        measured = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/skipped": float(not finite),
            "train/staleness": float(step - batch.policy_version),
            "train/learning_rate": learning_rate,
            "train/alpha": self.method.steering.alpha_at(step),
        }
        prompts, rows, parts = zip(*group.gathered((len(batch.groups) or 1, batch.metrics, metrics)), strict=True)
        rates = combined(list(zip(prompts, rows, strict=True)))
        self.log_dict(measured | rates | StepMetrics.joined(parts).metrics(), batch_size=1)
        made_for_it = [phase for phase in batch.phases if phase.step == policy.version]
        return {"phases": made_for_it + metrics.phases}

    def _gradient(self, lessons: Sequence[Lesson], totals: Sequence[float]) -> tuple[StepMetrics, float]:
        """Gradients and loss of the step. Where memory runs out, the same step in micro-batches of half the size."""
        while True:
            metrics = StepMetrics("training", self.policy.version + 1)
            self.zero_grad()
            try:
                with metrics.recording(), timed("student"):
                    return metrics, gradient(
                        self.method,
                        self.policy,
                        self.lent,
                        lessons,
                        totals,
                        self.tokens_per_micro_batch,
                        partial(self._observe, metrics),
                    )
            except torch.OutOfMemoryError:
                if self._halvings == _MAX_HALVINGS:
                    raise
            self._halvings += 1
            self.tokens_per_micro_batch = max(1, self.tokens_per_micro_batch // 2)
            print(f"Out of memory: now {self.tokens_per_micro_batch} tokens a micro-batch", file=sys.stderr, flush=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @timed("diagnostics")
    def _observe(self, metrics: StepMetrics, batch: MicroBatch) -> None:
        """Adds what a micro-batch shows to the metrics of its step."""
        drawn = self.method.sampling(max_tokens=1)
        for (_, term), result in zip(self.method.objective.terms, batch.results, strict=True):
            if len(batch.results) > 1:
                metrics.add(f"loss_{type(term).__name__.lower()}", result.value / result.total)
            for name, values in result.per_token.items():
                metrics.mean(name, values)
            old = result.states.old_logprobs
            if old is not None and "logprob" in result.per_token and drawn.is_softmax_at(term.temperature):
                # how far engine and trainer disagree on the tokens that were sampled
                metrics.mean("engine_logprob_gap", (result.per_token["logprob"] - old).abs())
        steered = batch.targets.get(Target("teacher", self.method.steering))
        if steered is not None:
            seed = derive("diagnostics", self.policy.version)
            found = diagnose(batch.lessons, batch.hidden_student, steered, self.policy.head, self._marker_ids, seed)
            for name, values in found.items():
                metrics.mean(name, values)

    @cached_property
    def _marker_ids(self) -> list[int]:
        return marker_ids(self.policy.tokenizer)

    # ---- evaluation ----

    def validation_step(self, groups: list[RolloutGroup], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._log_evaluation("val" if dataloader_idx == 0 else "val_with_solution", groups)

    def test_step(self, groups: list[RolloutGroup], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._log_evaluation("test" if dataloader_idx == 0 else "test_with_solution", groups)

    def predict_step(self, groups: list[RolloutGroup], batch_idx: int) -> None:
        """Computes nothing: the rollouts are the batch, and `RolloutWriter` keeps them."""

    def _log_evaluation(self, name: str, groups: list[RolloutGroup]) -> None:
        values = evaluate(groups)
        if self.kl_to_base:
            values["kl_to_base"] = kl_to_base(self.policy, groups, 2 * self.tokens_per_micro_batch)
        values = {f"{name}/{key}": value for key, value in values.items()}
        self.log_dict(values, batch_size=1, add_dataloader_idx=False)

    # ---- state ----

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {f"policy.{name}": value.detach() for name, value in self.policy.trainable().items()}

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        self.policy.load_trainable({name.removeprefix("policy."): value for name, value in state_dict.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ogls"] = {
            "format": FORMAT,
            "method": self.method.name,
            "policy_version": self.policy.version,
            "teacher": self.teacher.state_dict(self._kept["teacher"]),
            "tokenizer_sha256": tokenizer_sha256(self.policy.folder),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint["ogls"]
        if own.get("format") != FORMAT:
            raise ValueError(
                "this checkpoint was written by ogls 0.1, whose methods were made of other pieces: go on with it, or "
                "export its adapter, under version 0.1; this is version 0.2"
            )
        wanted, got = own["tokenizer_sha256"], tokenizer_sha256(self.policy.folder)
        if wanted != got:
            raise ValueError(f"the checkpoint was trained with another tokenizer or chat template: {wanted}, got {got}")
        self.policy.version = own["policy_version"]
        self.teacher.load_state_dict(self._kept["teacher"], own["teacher"])
