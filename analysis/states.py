"""Rollouts and their states from a configuration and a checkpoint, as a training step sees them but without one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ogls.cli import build
from ogls.data import RolloutDataModule
from ogls.loss.steering import Coefficients, Head, Steering, mean_of
from ogls.module import SelfDistillation
from ogls.policy.microbatch import micro_batches
from ogls.policy.states import student_states, view_states
from ogls.records import Batch, Lesson, Role


@dataclass(frozen=True)
class PoolMean(Steering):
    """The mean of all views of one role, alone."""

    role: Role

    def mixture(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        return mean_of(roles, self.role), (0.0,) * len(roles)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """States [tokens, hidden] of a lesson's first `num_learned` tokens; target = head(anchor + alpha * direction).

    `pools` has the mean state of each role's views, where it was asked for.
    """

    lesson: Lesson
    student: Tensor
    anchor: Tensor
    direction: Tensor
    pools: dict[Role, Tensor]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Options of a script that samples; what it does not know goes to the configuration, as in ``run.py fit``."""
    parser = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        epilog="All other options are those of experiments/run.py fit: --config, --data.problems_per_step ...",
    )
    parser.add_argument("--ckpt_path", type=Path, help="weights of the student; default: those it starts from")
    parser.add_argument("--step", type=int, help="optimiser step whose problems are sampled; default: the checkpoint's")
    return parser


@contextmanager
def opened(
    configuration: Sequence[str], checkpoint: Path | None
) -> Iterator[tuple[SelfDistillation, RolloutDataModule]]:
    """Module and data of ``--config ...``, weights loaded and ready to sample, tied together without a training run."""
    sys.argv[1:] = configuration
    cli = build(run=False)
    model, data = cli.model, cli.datamodule
    cli.trainer.strategy.connect(model)
    data.trainer = cli.trainer
    try:
        model.configure_model()
        model.to(cli.trainer.strategy.root_device)
        if checkpoint is not None:
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
            model.load_state_dict(saved["state_dict"])
            model.on_load_checkpoint(saved)
        data.setup("predict")
        yield model, data
    finally:
        data.close()


def distilled(batch: Batch) -> list[Lesson]:
    """The lessons that have a teacher; others reinforce, or imitate a text."""
    lessons = [lesson for lesson in batch.lessons if lesson.views]
    if not lessons:
        raise ValueError(
            f"{len(batch.groups)} problems gave no lesson with a teacher: set data.problems_per_step higher"
        )
    return lessons


def reaching(lesson: Lesson, num_tokens: int) -> Lesson:
    """The lesson with weights that make its first `num_tokens` tokens scored, learned or not."""
    rest = len(lesson.token_ids) - num_tokens
    return replace(lesson, weights=(1.0,) * num_tokens + (0.0,) * rest, advantage=0.0)


@torch.no_grad()
def score(model: SelfDistillation, lessons: Sequence[Lesson], pools: bool = False) -> list[Scored]:
    """States of all lessons, in their order; with `pools`, one more teacher pass over each view."""
    budget = model.tokens_per_micro_batch
    found: dict[int, Scored] = {}
    for few in micro_batches(lessons, budget):
        lengths = [lesson.num_learned for lesson in few]
        student = student_states(model.policy, few).float().split(lengths)
        means: list[dict[Role, Tensor]] = [{} for _ in few]
        with model.teacher.weights(model.policy):
            anchor, direction = (part.split(lengths) for part in view_states(model.policy, model.steering, few, budget))
            for role in {view.role for lesson in few for view in lesson.views} if pools else ():
                having = [i for i, lesson in enumerate(few) if any(view.role == role for view in lesson.views)]
                mean, _ = view_states(model.policy, PoolMean(role), [few[i] for i in having], budget)
                for i, part in zip(having, mean.split([lengths[i] for i in having]), strict=True):
                    means[i][role] = part
        for i, lesson in enumerate(few):
            found[id(lesson)] = Scored(
                lesson=lesson, student=student[i], anchor=anchor[i], direction=direction[i], pools=means[i]
            )
    return [found[id(lesson)] for lesson in lessons]


def logits_of(head: Head, student: Tensor, *others: Tensor) -> list[Tensor]:
    """fp32 logits [tokens, vocab] of the student's states and of others [tokens, hidden].

    The others' are the student's and the product of the difference: two sets of logits, each rounded by itself, would
    be farther apart than small divergences are.
    """
    weight, bias = head

    def product(states: Tensor) -> Tensor:
        return (states.to(weight.dtype) @ weight.T).float()

    logits = product(student) if bias is None else product(student) + bias
    return [logits, *(logits + product(other.float() - student.float()) for other in others)]
