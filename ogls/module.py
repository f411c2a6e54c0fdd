"""The LightningModule: student, teacher, steering and objective; one batch is one optimiser step."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor

from ogls.batching import micro_batches
from ogls.evaluation import evaluate
from ogls.kernels import diagnostics
from ogls.meter import Meter
from ogls.model import load_tokenizer, resolve_model
from ogls.objective import Distillation, Objective, States
from ogls.policy import Lora, Policy
from ogls.prompts import REFLECTION_MARKERS
from ogls.records import Batch, Lesson, RolloutGroup
from ogls.scoring import prompt_states, score_views
from ogls.seeds import derive
from ogls.steering import OutcomeSteering, Steering
from ogls.teacher import Frozen, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DIAGNOSED_TOKENS = 64  # of each micro-batch


class SelfDistillation(LightningModule):
    """A language model that learns from itself.

        loss = sum_t w_t D(softmax(W h_student,t), softmax(W h_target,t)) / sum_t w_t,   h_target = steering(views)

    over all tokens of one optimiser step, whatever the micro-batches.

    Args:
        model: the embedded model's name, a local folder, or a Hub id.
        adapter: a peft folder merged into the model before training begins (a cold start); looked up in the working
            directory, then in the project's.
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
        self.model_name, self.adapter, self.lora, self.dtype_name = model, adapter, lora, dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.teacher, self.steering, self.objective = teacher or Frozen(), steering, objective
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.schedule, self.warmup_steps, self.max_grad_norm = schedule, warmup_steps, max_grad_norm
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.policy_version = 0

    # ---- the model: folder and tokenizer first, weights when the trainer asks for them ----

    @cached_property
    def folder(self) -> Path:
        """The folder that trainer and engine read."""
        adapter = self.adapter
        if adapter is not None and not Path(adapter).exists():
            beside = Path(__file__).resolve().parents[1] / adapter
            if not beside.exists():
                raise ValueError(f"model.adapter: no folder {adapter!r} in the working directory or the project")
            adapter = str(beside)
        return resolve_model(self.model_name, adapter)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)

    def setup(self, stage: str) -> None:
        """Do the parts fit together? Asked before any weights are loaded."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if stage != "fit" and not data.fit_follows:
            return
        if self.objective.needs_teacher:
            roles = sorted(data.privilege.roles)
            try:
                self.steering.mixture(["plain", *roles])
            except ValueError as error:
                names = f"{type(self.steering).__name__} and {type(data.privilege).__name__}"
                raise ValueError(f"model.steering and data.privilege do not fit, {names}: {error}") from error
            if not data.privilege.samples_rollouts:
                raise ValueError(f"{type(data.privilege).__name__} gives no views to distil from: set model.objective")
        samples = data.evaluation.samples
        for callback in self.trainer.checkpoint_callbacks:
            asked = re.fullmatch(r"val\w*/(avg|pass|maj)_at_(\d+)", callback.monitor or "")  # pyright: ignore
            if asked and (int(asked[2]) > samples or (asked[1] == "avg" and int(asked[2]) != samples)):
                raise ValueError(
                    f"a checkpoint waits for {asked[0]}, but data.evaluation.samples is {samples}: "
                    f"expected val/avg_at_{samples}"
                )
        if data.updates_per_rollout > 1 and not self.objective.corrects_staleness:
            raise ValueError(
                f"data.updates_per_rollout is {data.updates_per_rollout}, so rollouts are off-policy: "
                "set model.objective.importance_cap"
            )

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

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert self.policy_version == self.trainer.global_step, (self.policy_version, self.trainer.global_step)
        assert 0 <= self.policy_version - batch.policy_version < data.updates_per_rollout
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        total = sum(sum(lesson.weights) for lesson in batch.lessons)
        meter = Meter()
        meter.add("loss", 0.0)
        self.policy.train()
        optimizer.zero_grad()
        for lessons in micro_batches(batch.lessons, self.tokens_per_micro_batch):
            loss = self._micro_batch(lessons, meter) / total
            with meter.time("student"):
                self.manual_backward(loss)
            meter.add("loss", loss.item())
        with meter.time("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(
                self.policy.trainable().values(), self.max_grad_norm or float("inf"), error_if_nonfinite=True
            )
            optimizer.step()
            scheduler.step()
            self.teacher.update(self.policy)
        self.policy_version += 1
        self.log_dict(
            {
                "train/grad_norm": norm.item(),
                "train/learning_rate": scheduler.get_last_lr()[0],
                "train/alpha": self.steering.alpha_at(self.policy_version - 1),
                **batch.metrics,
                **meter.metrics(),
            },
            batch_size=1,
        )

    def _micro_batch(self, lessons: Sequence[Lesson], meter: Meter) -> Tensor:
        """Weighted sum of the loss over the tokens of some lessons."""
        weight, bias = self.policy.head
        learned = [(lesson, lesson.num_learned) for lesson in lessons]
        weights = self._tensor([w for lesson, n in learned for w in lesson.weights[:n]])
        keep = weights.nonzero().squeeze(1)
        anchor = direction = target = old = None
        if self.objective.needs_teacher:
            with meter.time("teacher"), torch.no_grad(), self.teacher.weights(self.policy):
                states = score_views(self.policy, self.steering, lessons, 2 * self.tokens_per_micro_batch)
                anchor, direction = (state[keep] for state in states)
                target = self.steering.target(anchor, direction, self.policy_version, self.policy.head)
        if all(lesson.logprobs is not None for lesson in lessons):
            old = self._tensor([p for lesson, n in learned for p in (lesson.logprobs or ())[:n]])[keep]
        with meter.time("student"):
            student = prompt_states(self.policy, lessons)[keep]
            loss, extras = self.objective(
                States(
                    hidden_student=student,
                    hidden_target=target,
                    weight=weight,
                    bias=bias,
                    token_ids=self._tensor([t for lesson, n in learned for t in lesson.token_ids[:n]], torch.long)[
                        keep
                    ],
                    token_weights=weights[keep],
                    old_logprobs=old,
                    advantages=self._tensor([lesson.advantage for lesson, n in learned for _ in range(n)])[keep],
                )
            )
        for name, values in extras.items():
            meter.mean(name, values)
        if old is not None:  # how far engine and trainer disagree on the tokens that were sampled
            meter.mean("engine_logprob_gap", (extras["logprob"] - old).abs())
        if anchor is not None and direction is not None:
            with meter.time("diagnostics"):
                self._diagnose(student.detach(), anchor, direction, meter)
        return loss

    def _diagnose(self, student: Tensor, anchor: Tensor, direction: Tensor, meter: Meter) -> None:
        """What the target is, on a sample of tokens that is the same for the same step."""
        generator = torch.Generator().manual_seed(derive("diagnostics", self.policy_version))
        rows = torch.randperm(len(student), generator=generator)[:_DIAGNOSED_TOKENS].to(student.device)
        weight, bias = self.policy.head
        alpha = self.steering.alpha_at(self.policy_version)
        values = diagnostics(
            student[rows], anchor[rows], direction[rows], alpha, weight, bias, marker_ids=self._marker_ids
        )
        for name, value in values.items():
            meter.mean(name, torch.tensor(value))

    @cached_property
    def _marker_ids(self) -> list[int]:
        """First tokens of the reflection markers, as they stand at a line's beginning or after a space."""
        forms = [lead + form for m in REFLECTION_MARKERS for form in (m, m.capitalize()) for lead in ("", " ")]
        return sorted({self.tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms})

    def _tensor(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    # ---- evaluation ----

    def validation_step(self, groups: list[RolloutGroup], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._log_evaluation("val" if dataloader_idx == 0 else "val_with_solution", groups)

    def test_step(self, groups: list[RolloutGroup], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._log_evaluation("test" if dataloader_idx == 0 else "test_with_solution", groups)

    def predict_step(self, groups: list[RolloutGroup], batch_idx: int) -> None:
        """Nothing to compute: the rollouts are the batch, and `RolloutWriter` keeps them."""

    def _log_evaluation(self, name: str, groups: list[RolloutGroup]) -> None:
        values = {f"{name}/{key}": value for key, value in evaluate(groups).items()}
        self.log_dict(values, batch_size=1, add_dataloader_idx=False)

    # ---- state ----

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {f"policy.{name}": value.detach() for name, value in self.policy.trainable().items()}

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        self.policy.load_trainable({name.removeprefix("policy."): value for name, value in state_dict.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ogls"] = {"policy_version": self.policy_version, "teacher": self.teacher.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.policy_version = checkpoint["ogls"]["policy_version"]
        self.teacher.load_state_dict(checkpoint["ogls"]["teacher"])
