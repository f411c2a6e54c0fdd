"""The LightningModule trains the student: one batch is one optimiser step."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from ogls.algorithm import MicroBatch, gradient, weight_totals
from ogls.data import RolloutDataModule, at_end
from ogls.loss.diagnostics import diagnose
from ogls.loss.objective import Target
from ogls.methods.base import Method
from ogls.planner import planned
from ogls.policy.kl_to_base import kl_to_base
from ogls.policy.microbatch import micro_batches, num_tokens
from ogls.policy.policy import OutOfMemory, Policy, out_of_memory, quickest_dtype
from ogls.policy.pretrained import tokenizer_sha256, weights_sha256
from ogls.policy.sharding import on_first, whole
from ogls.policy.teacher import Frozen, Teacher, Weights
from ogls.records import Batch, Lesson, RolloutGroup
from ogls.rollout.accuracy import by_set, evaluate, marker_ids
from ogls.system.exits import RunEnded
from ogls.system.memory.plan import CONTEXT
from ogls.system.process_group import ProcessGroup, combined
from ogls.system.ranges import POSITIVE, check, within
from ogls.system.seeds import derive
from ogls.system.step_metrics import StepMetrics, timed

_TOKENS = 4096  # of a micro-batch, where neither configuration nor memory says how many
_MAX_HALVINGS = 3  # how often a run may halve its micro-batches
_INTERVALS = {
    "learning_rate": "(0, 0.1]",
    "weight_decay": "[0, 1]",
    "warmup_steps": "[0, 1e9]",
    "max_grad_norm": POSITIVE,
}
FORMAT = 2
"""Checkpoints have this format; those of format 1 have a method in pieces, by names that are gone."""


class SelfDistillation(LightningModule):
    """This module trains a language model that learns from itself.

        loss = sum_t w_t D(softmax(W h_target,t), softmax(W h_student,t)) / sum_t w_t,   h_target = steering(views)

    The sums run over all tokens of one optimiser step, so that the cut into micro-batches makes no difference. Other
    objectives are sums of such means. `ogls.algorithm` is what a step computes.

    Args:
        policy: student, shared with the data module and its engine
        method: choice of what is learned, from whom, and towards which target
        learning_rate: AdamW step size
        weight_decay: AdamW decay of the weights per step, as a multiple of the learning rate
        betas: AdamW decay rates of the mean gradient and of the mean squared gradient
        schedule: course of the learning rate after the warm-up; linear and cosine end at 0
        warmup_steps: optimiser steps over which the learning rate rises linearly to `learning_rate`
        max_grad_norm: gradient norm above which a gradient is scaled down to it; null never scales
        tokens_per_micro_batch: budget of prompt and completion tokens in one forward and backward pass; null takes 4096
            on a CPU, and on a GPU what its memory holds
        kl_to_base: whether a validation measures how far the student has moved from its start, in nats per token; this
            takes two more passes over one rollout per problem
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
        tokens_per_micro_batch: int | None = None,
        kl_to_base: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained, not the base weights
        self.policy, self.method = policy, method
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.schedule, self.warmup_steps, self.max_grad_norm = schedule, warmup_steps, max_grad_norm
        self.asked_tokens, self.kl_to_base = tokens_per_micro_batch, kl_to_base
        for beta in betas:
            within("model.betas", beta, "[0, 1)")
        within("model.tokens_per_micro_batch", tokens_per_micro_batch, "[1, 1e9]")
        check(self, _INTERVALS, "model")
        self.tokens_per_micro_batch = tokens_per_micro_batch or _TOKENS
        self.other = method.teacher.other(policy)
        self._kept: dict[str, Weights] = {}  # weights that the teachers keep beside the student's
        self._halvings = 0

    @property
    def teacher(self) -> Teacher:
        """Returns the method's teacher."""
        return self.method.teacher

    @property
    def steering(self) -> Any:
        """Returns the method's steering."""
        return self.method.steering

    @property
    def reflector(self) -> Any:
        """Returns the method's reflector; None for a method without one."""
        return self.method.reflector

    @property
    def teachers(self) -> dict[str, Teacher]:
        """Returns the teachers whose weights make targets, by `Target.weights`."""
        return {"teacher": self.teacher, "start": Frozen()}

    def setup(self, stage: str) -> None:
        """Decides what a configuration leaves open by the memory of a GPU, before weights are read."""
        root, data = self.trainer.strategy.root_device, getattr(self.trainer, "datamodule", None)
        if self.other is not None and self._trains:
            self.other.check()
        if isinstance(data, RolloutDataModule) and data.engine is not None:
            data.engine.check_device(root.type)
            if self.device_mesh is not None and not data.engine.copies_policy:
                raise ValueError(
                    f"{type(data.engine).__name__} samples with the policy itself, of which each process has a part "
                    "under --trainer.strategy sharded: set data.engine to one that copies weights"
                )
        if self.trainer.is_global_zero and self.policy.dtype == "bfloat16" and quickest_dtype() != "bfloat16":
            hint = "this processor multiplies bfloat16 several times as slowly as float32: consider"
            print(f"{hint} --policy.dtype float32 --data.engine.dtype float32", file=sys.stderr, flush=True)
        device = _free_bytes(root)
        if device is not None and not self._kept and isinstance(data, RolloutDataModule) and data.trains:
            sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
            plan = planned(self, data, device, self.group.size, sharded)
            self.tokens_per_micro_batch, self.policy.gradient_checkpointing = plan.tokens, plan.checkpointing
            if self.trainer.is_global_zero:
                print(plan.table(), flush=True)

    def configure_model(self) -> None:
        """Reads the weights when the trainer asks for them, after all settings have been checked."""
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        if not self._kept:
            self.policy.load(mesh)
            asked = {"teacher", *(target.weights for target in self.method.targets)}
            asked |= {"start"} if self.kl_to_base else set()
            for name in asked:  # one copy of the weights where the teacher is the start
                same = next((other for other in self._kept if self.teachers[other] == self.teachers[name]), None)
                self._kept[name] = self.teachers[name].start(self.policy) if same is None else self._kept[same]
        if self.other is not None and self._trains:
            self.other.load(mesh)

    def on_train_start(self) -> None:
        """Has what the configuration says of the optimiser stand above what a checkpoint had."""
        optimizer, scheduler = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        for group in optimizer.param_groups:
            group |= {"initial_lr": self.learning_rate, "weight_decay": self.weight_decay, "betas": tuple(self.betas)}
            group["lr"] = self.learning_rate * scheduler.lr_lambdas[0](scheduler.last_epoch)
        scheduler.base_lrs = [self.learning_rate]
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]

    def on_train_batch_end(self, *_: Any) -> None:
        """Has training end with a validation, whatever `check_val_every_n_epoch` says."""
        if at_end(self.trainer):
            self.trainer.check_val_every_n_epoch = 1

    def configure_optimizers(self) -> Any:
        """Returns AdamW over the trainable weights, and its schedule."""
        parameters = list(self.policy.trainable().values())
        settings = {"lr": self.learning_rate, "betas": self.betas, "weight_decay": self.weight_decay}
        fused = parameters[0].is_cuda or None  # else a GPU gets one more copy of all weights for the update
        optimizer = torch.optim.AdamW(parameters, **settings, fused=fused)
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
        """Returns the batch as it is: it holds token ids, and tensors are made micro-batch by micro-batch."""
        return batch

    @property
    def group(self) -> ProcessGroup:
        """Returns the processes that make a step together."""
        return ProcessGroup(self.trainer.global_rank, self.trainer.world_size)

    @property
    def policy_with(self) -> dict[str, Callable[[], AbstractContextManager[Policy]]]:
        """Returns a context manager per value of `Target.weights`, which gives a model with those weights."""
        readers = {"teacher": self.policy if self.other is None else self.other, "start": self.policy}
        return {n: partial(self.teachers[n].applied_to, readers[n], kept) for n, kept in self._kept.items()}

    @property
    def _trains(self) -> bool:
        """Returns whether a teacher is needed: in training, in the validation before it, and without a trainer."""
        data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        return data.trains if isinstance(data, RolloutDataModule) else True

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Makes one update, and returns what was measured of its step: the phases and the row of metrics."""
        policy, group, step = self.policy, self.group, self.policy.version
        assert step == self.trainer.global_step, (step, self.trainer.global_step)
        assert batch.policy_version <= step, (batch.policy_version, step)
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        totals = group.summed(weight_totals(self.method, batch.lessons))
        policy.train()
        metrics, loss = self._gradient(batch.lessons, totals)
        if self.other is not None:
            self.other.let_go()
        (loss,) = group.summed([loss])
        with metrics.time("optimizer"):
            parameters = list(policy.trainable().values())
            if any(totals) and policy.parts is None:
                group.add_gradients(parameters)
            norm = whole(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf"))).item()
            finite = math.isfinite(loss) and math.isfinite(norm)
            if not finite:
                optimizer.zero_grad()  # AdamW leaves weights without a gradient exactly as they are
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
        row = measured | rates | StepMetrics.joined(parts).metrics()
        self.log_row(row, policy.version)
        made_for_it = [phase for phase in batch.phases if phase.step == policy.version]
        return {"phases": made_for_it + metrics.phases, "row": row}

    def log_row(self, row: dict[str, float], step: int) -> None:
        """Logs the metrics of a step, and those alone: Lightning logs what a step lacks again from an earlier one.

        Args:
            row: values by name, which callbacks can monitor, too
            step: number of updates so far
        """
        self.log_dict(row, batch_size=1, logger=False)
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if every and step % every == 0:
            for logger in self.loggers:
                logger.log_metrics(row | {"epoch": self.current_epoch}, step)
                logger.save()

    def _gradient(self, lessons: Sequence[Lesson], totals: Sequence[float]) -> tuple[StepMetrics, float]:
        """Makes the gradients of the step, and returns its metrics and loss.

        If memory runs out, the step is made again in micro-batches of half the size, or, where the largest one is a
        single lesson, with activations that are computed anew.
        """
        while True:
            metrics = StepMetrics("training", self.policy.version + 1)
            self.policy.let_go()  # or gradients of weights that are whole now would be forgotten, and no parts'
            self.zero_grad()
            try:
                with metrics.recording(), timed("student"), self.policy.outlasting():
                    return metrics, gradient(
                        self.method,
                        self.policy,
                        self.policy_with,
                        lessons,
                        totals,
                        self.tokens_per_micro_batch,
                        partial(self._observe, metrics),
                    )
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.policy.parts is not None and not isinstance(error, OutOfMemory):
                    raise RunEnded(
                        f"memory ran out in process {self.global_rank}, for which all others wait "
                        f"({error}). Set --model.tokens_per_micro_batch below {self.tokens_per_micro_batch}, or "
                        "--policy.gradient_checkpointing true, and go on by --ckpt_path last"
                    ) from error
                if not self._takes_less(lessons):
                    raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _takes_less(self, lessons: Sequence[Lesson]) -> bool:
        """Has the next try take less memory; returns False if there is nothing left to try."""
        batches = micro_batches(lessons, self.tokens_per_micro_batch)
        largest = max(batches, key=lambda some: sum(map(num_tokens, some)), default=[])
        alone = [len(largest) <= 1]
        if self.policy.parts is not None:  # all do the same
            self.policy.recover()
            alone = self.policy.parts.gathered(*alone)
        if all(alone) and self.policy.gradient_checkpointing is not True:
            self.policy.checkpoint()
            now = "gradient checkpointing"
        elif self._halvings < _MAX_HALVINGS:
            self._halvings += 1
            self.tokens_per_micro_batch = max(1, self.tokens_per_micro_batch // 2)
            now = f"{self.tokens_per_micro_batch} tokens per micro-batch"
        else:
            return False
        print(f"Out of memory: now {now}", file=sys.stderr, flush=True)
        return True

    @timed("diagnostics")
    def _observe(self, metrics: StepMetrics, batch: MicroBatch) -> None:
        """Adds the loss of every term and the diagnostics of a micro-batch to the metrics of its step."""
        drawn = self.method.sampling(max_tokens=1)
        seen: Counter[str] = Counter()
        for (_, term), result in zip(self.method.objective.terms, batch.results, strict=True):
            kind = type(term).__name__.lower()
            seen[kind] += 1
            which = "" if seen[kind] == 1 else f"_{seen[kind]}"  # of several terms of one class
            if len(batch.results) > 1:
                metrics.add(f"loss_{kind}{which}", result.value / result.total)
            for name, values in result.per_token.items():
                metrics.mean(name + which, values)
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
        """Logs the accuracy of held-out rollouts as ``val/...``, of the subset as ``val_subset/...``, and of those with
        solutions as ``val_with_solution/...`` and ``val_subset_with_solution/...``. Where there are several evaluation
        sets, these are figures of all their problems, and each set has its own as ``val/SET/...``.
        """
        data: RolloutDataModule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        for name, some in data.evaluation.by_name(groups, data.validates_all).items():
            self._log_evaluation(name if dataloader_idx == 0 else f"{name}_with_solution", some)

    def test_step(self, groups: list[RolloutGroup], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Logs the accuracy of test rollouts as ``test/...``, or ``test_with_solution/...``."""
        self._log_evaluation("test" if dataloader_idx == 0 else "test_with_solution", groups)

    def predict_step(self, groups: list[RolloutGroup], batch_idx: int) -> None:
        """Computes nothing: the batch is the rollouts, which `RolloutWriter` writes to a file."""

    def _log_evaluation(self, name: str, groups: Sequence[RolloutGroup]) -> None:
        values = evaluate(groups)
        for part, some in by_set(groups).items():
            values |= {f"{part}/{key}": value for key, value in evaluate(some).items()}
        if self.kl_to_base:
            budget = 2 * self.tokens_per_micro_batch
            values["kl_to_base"] = kl_to_base(self.policy, groups, budget, self.policy_with["start"])
        values = {f"{name}/{key}": value for key, value in values.items()}
        self.log_dict(values, batch_size=1, add_dataloader_idx=False)

    # ---- state ----

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns the trainable weights alone."""
        return {f"policy.{name}": value.detach() for name, value in self.policy.trainable().items()}

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Takes over the trainable weights of a checkpoint."""
        self.policy.load_trainable({name.removeprefix("policy."): value for name, value in state_dict.items()})

    @cached_property
    def _folder_sums(self) -> dict[str, str]:
        """Returns the checksums of what does not change in a run; checkpoints would read it again and again."""
        folder = self.policy.folder
        return {"tokenizer_sha256": tokenizer_sha256(folder), "weights_sha256": weights_sha256(folder)}

    @cached_property
    def _teacher_sha256(self) -> str | None:
        return None if self.other is None else weights_sha256(self.other.folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the state that is not in the weights under the key ``ogls``."""
        checkpoint["ogls"] = {
            "format": FORMAT,
            "method": self.method.name,
            "policy_version": self.policy.version,
            "teacher": on_first(self.teacher.state_dict(self._kept["teacher"])),
            "teacher_sha256": self._teacher_sha256,
            **self._folder_sums,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the version and the teacher's weights.

        Raises:
            ValueError: the checkpoint has another format, or was made with another tokenizer, other base weights or
                another teacher's.
        """
        own = checkpoint["ogls"]
        if own.get("format") != FORMAT:
            raise ValueError(
                "this checkpoint was written by ogls 0.1, whose methods were made of other pieces: go on with it, or "
                "export its adapter, under version 0.1; this is version 0.2"
            )
        wanted, got = own["tokenizer_sha256"], self._folder_sums["tokenizer_sha256"]
        if wanted != got:
            raise ValueError(f"the checkpoint was trained with another tokenizer or chat template: {wanted}, got {got}")
        wanted, got = own.get("weights_sha256"), self._folder_sums["weights_sha256"]
        if wanted != got:
            raise ValueError(
                f"the checkpoint was trained on other base weights: {wanted}, got {got} in {self.policy.folder}"
            )
        if self.other is not None and self._trains and own.get("teacher_sha256") != self._teacher_sha256:
            raise ValueError(
                f"the checkpoint was trained by another teacher: {own.get('teacher_sha256')}, got "
                f"{self._teacher_sha256} in {self.other.folder}"
            )
        self.policy.version = own["policy_version"]
        if self._trains:
            self.teacher.load_state_dict(self._kept["teacher"], self.policy.parted(own["teacher"]))


def _free_bytes(device: torch.device) -> int | None:
    """Returns the bytes of a GPU that this process can have, its own context included; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] + CONTEXT if device.type == "cuda" else None
