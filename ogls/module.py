"""The LightningModule: student, teacher, steering and objective; one batch is one optimiser step."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor

from ogls.compatibility import check_method, check_monitors
from ogls.loss.diagnostics import diagnostics
from ogls.loss.objective import Distillation, Objective, States
from ogls.loss.steering import OutcomeSteering, Steering
from ogls.policy.kl_to_base import kl_to_base
from ogls.policy.lora import Lora
from ogls.policy.microbatch import micro_batches
from ogls.policy.policy import Policy
from ogls.policy.pretrained import load_tokenizer, local_folder, resolve_model, tokenizer_sha256
from ogls.policy.states import student_states, view_states
from ogls.policy.teacher import Frozen, Teacher
from ogls.records import Batch, Lesson, RolloutGroup, Sampling
from ogls.rollout.accuracy import REFLECTION_MARKERS, evaluate
from ogls.system.process_group import ProcessGroup, combined
from ogls.system.seeds import derive
from ogls.system.step_metrics import StepMetrics

_MAX_HALVINGS = 3  # of the micro-batches, in a run
_DIAGNOSED_TOKENS = 64  # of each micro-batch


class SelfDistillation(LightningModule):
    """A language model that learns from itself.

        loss = sum_t w_t D(softmax(W h_student,t), softmax(W h_target,t)) / sum_t w_t,   h_target = steering(views)

    over all tokens of one optimiser step, whatever the micro-batches; with another objective, a sum of such means.

    Args:
        model: the embedded model's name, a folder, or a Hub id. Folders are looked up in the working directory, then in
            the project's.
        adapter: a peft folder merged into the model before training begins (a cold start); looked up likewise.
        lora: what is trained; null trains all weights but embeddings and output head.
        dtype: of the weights that are not trained, and of the computation.
        gradient_checkpointing: recompute activations in the backward pass; gives up shared prefixes there.
        teacher: which weights teach; null is `Frozen`.
        steering: how the teacher's views become a target.
        objective: what is minimised.
        learning_rate, weight_decay, betas: of AdamW.
        schedule: of the learning rate after `warmup_steps` of linear rise; linear and cosine end at 0.
        max_grad_norm: gradient norm above which the step is scaled down; null never does.
        tokens_per_micro_batch: budget of prompt and completion tokens in one forward and backward pass.
    """

    def __init__(
        self,
        model: str = "smollm2-135m-instruct",
        adapter: str | None = None,
        lora: Lora | None = Lora(),
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        gradient_checkpointing: bool = False,
        teacher: Teacher | None = None,
        steering: Steering = OutcomeSteering(),
        objective: Objective = Distillation(),
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup_steps: int = 0,
        max_grad_norm: float | None = 1.0,
        tokens_per_micro_batch: int = 4096,
    ) -> None:
        super().__init__()
        if learning_rate <= 0:
            raise ValueError(f"model.learning_rate must be positive, got {learning_rate}")
        if tokens_per_micro_batch < 1:
            raise ValueError(f"model.tokens_per_micro_batch must be at least 1, got {tokens_per_micro_batch}")
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained, not the base weights
        self.model_name, self.adapter, self.lora = model, adapter, lora
        self.dtype_name: Literal["bfloat16", "float32"] = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.teacher, self.steering, self.objective = teacher or Frozen(), steering, objective
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.schedule, self.warmup_steps, self.max_grad_norm = schedule, warmup_steps, max_grad_norm
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.policy_version = self._halvings = 0

    # ---- the model: folder and tokenizer first, weights when the trainer asks for them ----

    @cached_property
    def folder(self) -> Path:
        """The folder that trainer and engine read."""
        adapter = None if self.adapter is None else local_folder(self.adapter)
        if self.adapter is not None and adapter is None:
            raise ValueError(f"model.adapter: no folder {self.adapter!r} in the working directory or the project")
        return resolve_model(self.model_name, None if adapter is None else str(adapter))

    @cached_property
    def tokenizer(self):  # a named type would make jsonargparse import transformers for --help
        return load_tokenizer(self.folder)

    def setup(self, stage: str) -> None:
        """Do the parts fit together? Asked before any weights are loaded."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        data.ranks = ProcessGroup(self.trainer.global_rank, self.trainer.world_size)
        if data.problems_per_step < data.ranks.size:
            raise ValueError(f"data.problems_per_step is {data.problems_per_step} for {data.ranks.size} devices")
        if stage != "fit" and not data.fit_follows:
            return
        check_method(self.objective, self.steering, data)
        self._drawn: Sampling = data.sampling
        callbacks = self.trainer.checkpoint_callbacks
        check_monitors((callback.monitor for callback in callbacks), data.evaluation.samples)  # pyright: ignore

    def configure_model(self) -> None:
        if "policy" in self._modules:
            return
        self.policy = Policy(
            self.folder, lora=self.lora, dtype=self.dtype_name, gradient_checkpointing=self.gradient_checkpointing
        )
        self.teacher.start(self.policy)

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

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One update; returns the `intervals` of its step."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert self.policy_version == self.trainer.global_step, (self.policy_version, self.trainer.global_step)
        staleness = self.policy_version - batch.policy_version
        assert 0 <= staleness <= data.max_staleness, (self.policy_version, batch.policy_version)
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        terms = [term for _, term in self.objective.terms]
        ranks = data.ranks
        totals = ranks.summed([sum(sum(term.weights_of(lesson)) for lesson in batch.lessons) for term in terms])
        self.policy.train()
        meter, loss = self._accumulate(batch.lessons, totals)
        (loss,) = ranks.summed([loss])
        with meter.time("optimizer"):
            parameters = list(self.policy.trainable().values())
            if any(totals):
                ranks.add_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf")).item()
            finite = math.isfinite(loss) and math.isfinite(norm)
            if not finite:
                optimizer.zero_grad()  # AdamW passes over weights without a gradient: not a bit of them changes
            optimizer.step()
            (learning_rate,) = scheduler.get_last_lr()
            scheduler.step()
            if finite:
                self.teacher.update(self.policy)
        self.policy_version += 1
        measured = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/skipped": float(not finite),
            "train/staleness": float(staleness),
            "train/learning_rate": learning_rate,
            "train/alpha": self.steering.alpha_at(self.policy_version - 1),
        }
        prompts, rows, meters = zip(*ranks.gathered((len(batch.groups) or 1, batch.metrics, meter)), strict=True)
        rates = combined(list(zip(prompts, rows, strict=True)))
        self.log_dict(measured | rates | StepMetrics.joined(meters).metrics(), batch_size=1)
        made_for_it = [interval for interval in batch.intervals if interval.step == self.policy_version]
        return {"intervals": made_for_it + meter.intervals}

    def _accumulate(self, lessons: Sequence[Lesson], totals: Sequence[float]) -> tuple[StepMetrics, float]:
        """Gradients and loss of the step. Where memory runs out, the same step in micro-batches of half the size."""
        while True:
            meter, loss = StepMetrics("training", self.policy_version + 1), 0.0
            self.zero_grad()
            try:
                for part in micro_batches(lessons, self.tokens_per_micro_batch):
                    value = self._micro_batch(part, totals, meter)
                    with meter.time("student"):
                        value.backward()
                    loss += value.item()
                return meter, loss
            except torch.OutOfMemoryError:
                if self._halvings == _MAX_HALVINGS:
                    raise
            self._halvings += 1
            self.tokens_per_micro_batch = max(1, self.tokens_per_micro_batch // 2)
            print(f"Out of memory: now {self.tokens_per_micro_batch} tokens a micro-batch", file=sys.stderr, flush=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _micro_batch(self, lessons: Sequence[Lesson], totals: Sequence[float], meter: StepMetrics) -> Tensor:
        """The objective's terms over the tokens of some lessons, each divided by its total weight in the step."""
        anchor = direction = target = None
        alpha: float | Tensor = 0.0
        if self.objective.needs_teacher:
            with meter.time("teacher"), torch.no_grad():
                with self.teacher.weights(self.policy):
                    anchor, direction = view_states(
                        self.policy, self.steering, lessons, 2 * self.tokens_per_micro_batch
                    )
                alpha = self.steering.strength(anchor, direction, self.policy_version, self.policy.head)
                target = anchor + alpha * direction
        with meter.time("student"):
            states = self._states(lessons, anchor, target)
            loss = states.hidden_student.new_zeros(())
            for (factor, term), total in zip(self.objective.terms, totals, strict=True):
                own = states.weighted(self._of_tokens(lessons, term.weights_of))
                value, extras = term(own)
                loss = loss + factor * value / (total or 1.0)
                if len(totals) > 1:
                    meter.add(f"loss_{type(term).__name__.lower()}", value.item() / (total or 1.0))
                for name, values in extras.items():
                    meter.mean(name, values)
                if own.old_logprobs is not None and self._drawn.is_softmax_at(term.temperature):
                    # how far engine and trainer disagree on the tokens that were sampled
                    meter.mean("engine_logprob_gap", (extras["logprob"] - own.old_logprobs).abs())
        if anchor is not None and direction is not None:
            with meter.time("diagnostics"):
                self._diagnose(lessons, states.hidden_student.detach(), anchor, direction, alpha, meter)
        return loss

    def _states(self, lessons: Sequence[Lesson], anchor: Tensor | None, target: Tensor | None) -> States:
        weight, bias = self.policy.head
        sampled = all(lesson.logprobs is not None for lesson in lessons)
        return States(
            hidden_student=student_states(self.policy, lessons),
            hidden_anchor=anchor,
            hidden_target=target,
            weight=weight,
            bias=bias,
            token_ids=self._of_tokens(lessons, lambda lesson: lesson.token_ids).long(),
            token_weights=self._of_tokens(lessons, lambda lesson: lesson.weights),
            old_logprobs=self._of_tokens(lessons, lambda lesson: lesson.logprobs or ()) if sampled else None,
            advantages=self._of_tokens(lessons, lambda lesson: (lesson.advantage,) * len(lesson.token_ids)),
        )

    def _of_tokens(self, lessons: Sequence[Lesson], values: Callable[[Lesson], Sequence[float]]) -> Tensor:
        """One value for each learned token of the lessons [tokens]."""
        return torch.tensor(
            [value for lesson in lessons for value in values(lesson)[: lesson.num_learned]], device=self.device
        )

    def _diagnose(
        self,
        lessons: Sequence[Lesson],
        student: Tensor,
        anchor: Tensor,
        direction: Tensor,
        alpha: float | Tensor,
        meter: StepMetrics,
    ) -> None:
        """What the target is, on a sample of distilled tokens that is the same for the same step."""
        taught = self._of_tokens(lessons, lambda lesson: [w * bool(lesson.views) for w in lesson.weights]).nonzero()
        generator = torch.Generator().manual_seed(derive("diagnostics", self.policy_version))
        rows = taught[torch.randperm(len(taught), generator=generator)[:_DIAGNOSED_TOKENS].to(taught.device), 0]
        steer = direction[rows]
        if isinstance(alpha, Tensor):  # one for each token: what is diagnosed is the steering as it is applied
            meter.mean("alpha", alpha[taught[:, 0]])
            steer, alpha = steer * alpha[rows], 1.0
        weight, bias = self.policy.head
        values = diagnostics(student[rows], anchor[rows], steer, alpha, weight, bias, marker_ids=self._marker_ids)
        for name, value in values.items():
            meter.mean(name, torch.tensor(value))

    @cached_property
    def _marker_ids(self) -> list[int]:
        """Reflection markers that are one token, as they stand at a line's beginning or after a space. The first token
        of a longer one ("let", "not") would say little."""
        forms = [lead + form for m in REFLECTION_MARKERS for form in (m, m.capitalize()) for lead in ("", " ")]
        ids = [self.tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
        return sorted({found[0] for found in ids if len(found) == 1})

    # ---- evaluation ----

    def validation_step(self, groups: list[RolloutGroup], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._log_evaluation("val" if dataloader_idx == 0 else "val_with_solution", groups)

    def test_step(self, groups: list[RolloutGroup], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._log_evaluation("test" if dataloader_idx == 0 else "test_with_solution", groups)

    def predict_step(self, groups: list[RolloutGroup], batch_idx: int) -> None:
        """Nothing to compute: the rollouts are the batch, and `RolloutWriter` keeps them."""

    def _log_evaluation(self, name: str, groups: list[RolloutGroup]) -> None:
        values = evaluate(groups)
        if self.trainer.datamodule.evaluation.kl_to_base:  # pyright: ignore[reportAttributeAccessIssue]
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
            "policy_version": self.policy_version,
            "teacher": self.teacher.state_dict(),
            "seed": self.trainer.datamodule.seed,  # pyright: ignore[reportAttributeAccessIssue]
            "tokenizer_sha256": tokenizer_sha256(self.folder),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        wanted, got = checkpoint["ogls"]["tokenizer_sha256"], tokenizer_sha256(self.folder)
        if wanted != got:
            raise ValueError(f"the checkpoint was trained with another tokenizer or chat template: {wanted}, got {got}")
        self.policy_version = checkpoint["ogls"]["policy_version"]
        self.teacher.load_state_dict(checkpoint["ogls"]["teacher"])
