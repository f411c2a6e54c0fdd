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

from ogls.callbacks.checkpoint_io import SoundCheckpoints
from ogls.cli import build
from ogls.data import RolloutDataModule
from ogls.loss.alpha_bound import Head
from ogls.loss.steering import Coefficients, Steering, mean_of
from ogls.methods import Method
from ogls.module import SelfDistillation
from ogls.policy.microbatch import micro_batches
from ogls.policy.states import student_states, view_states
from ogls.records import Batch, Lesson, Role
from ogls.tracking.files import check_checkpoint


@dataclass(frozen=True)
class PoolMean(Steering):
    """The target is the mean of all views of one role, alone."""

    role: Role

    def coefficients(self, roles: Sequence[Role]) -> tuple[Coefficients, Coefficients]:
        return mean_of(roles, self.role), (0.0,) * len(roles)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A scored lesson has the states [tokens, hidden] of its first `num_learned` tokens.

        target = head(anchor + alpha * direction)

    `pools` has the mean state of each role's views, where it was asked for.
    """

    lesson: Lesson
    student: Tensor
    anchor: Tensor
    direction: Tensor
    pools: dict[Role, Tensor]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Returns the options of a script that samples; all others belong to the configuration, as in ``run.py fit``."""
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
    """Yields module and data of ``--config ...`` with their weights, ready to sample, without a training run.

    Raises:
        ValueError: the checkpoint cannot be read, or the method has no teacher of the student's own weights.
    """
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    sys.argv[1:] = configuration
    cli = build(run=False)
    model, data = cli.model, cli.datamodule
    try:
        if not any(target.weights == "teacher" for target in model.method.targets):
            raise ValueError(
                f"{model.method.name} has no teacher, whose states are read here: expected one that has, such as OPSD"
            )
        if model.other is not None:
            raise ValueError(f"{model.method.name}: states are read by the student's head here, not by another model's")
        model.configure_model()
        model.to(cli.trainer.strategy.root_device)
        if checkpoint is not None:
            saved = SoundCheckpoints().load_checkpoint(checkpoint)
            model.load_state_dict(saved["state_dict"])
            model.on_load_checkpoint(saved)
        data.setup("predict")
        yield model, data
    finally:
        data.close()


def distilled(batch: Batch) -> list[Lesson]:
    """Returns the lessons that have a teacher; others reinforce, or imitate a text."""
    lessons = [lesson for lesson in batch.lessons if lesson.views]
    if not lessons:
        raise ValueError(
            f"{len(batch.groups)} problems gave no lesson with a teacher: set data.problems_per_step higher"
        )
    return lessons


def of_wrong(batch: Batch) -> list[Lesson]:
    """Returns the lessons of wrong rollouts that a teacher reads."""
    wrong = {(g.problem.id, r.completion.token_ids) for g in batch.groups for r in g.failures}
    lessons = [lesson for lesson in distilled(batch) if (lesson.problem_id, lesson.token_ids) in wrong]
    if not lessons:
        raise ValueError(
            f"no wrong rollout of {len(batch.groups)} problems is learned: set data.problems_per_step higher"
        )
    return lessons


def steering_of(method: Method) -> Steering:
    """Returns the steering of the first term of the objective that a teacher teaches."""
    return next(target.steering for target in method.targets if target.weights == "teacher")


def reaching(lesson: Lesson, num_tokens: int) -> Lesson:
    """Returns the lesson with weights that make its first `num_tokens` tokens scored, learned or not."""
    rest = len(lesson.token_ids) - num_tokens
    return replace(lesson, token_weights=(1.0,) * num_tokens + (0.0,) * rest, advantage=0.0)


@torch.no_grad()
def score(model: SelfDistillation, lessons: Sequence[Lesson], pools: bool = False) -> list[Scored]:
    """Returns states of all lessons, in their order; with `pools`, by one more teacher pass over each view."""
    policy, steering, budget = model.policy, steering_of(model.method), model.tokens_per_micro_batch
    found: dict[int, Scored] = {}
    for few in micro_batches(lessons, budget):
        lengths = [lesson.num_learned for lesson in few]
        student = student_states(policy, few).float().split(lengths)
        means: list[dict[Role, Tensor]] = [{} for _ in few]
        with model.policy_with["teacher"]():
            parts = view_states(policy, steering, few, lengths, budget)
            anchor, direction = (part.split(lengths) for part in parts)
            for role in {view.role for lesson in few for view in lesson.views} if pools else ():
                having = [i for i, lesson in enumerate(few) if any(view.role == role for view in lesson.views)]
                own = [lengths[i] for i in having]
                mean, _ = view_states(policy, PoolMean(role), [few[i] for i in having], own, budget)
                for i, part in zip(having, mean.split(own), strict=True):
                    means[i][role] = part
        for i, lesson in enumerate(few):
            found[id(lesson)] = Scored(
                lesson=lesson, student=student[i], anchor=anchor[i], direction=direction[i], pools=means[i]
            )
    return [found[id(lesson)] for lesson in lessons]


def logits_of(head: Head, student: Tensor, *others: Tensor) -> list[Tensor]:
    """Returns fp32 logits [tokens, vocab] of the student's states and of others [tokens, hidden].

    The others' are the student's and the product of the difference: two sets of logits, each rounded by itself, would
    be farther apart than small divergences are.
    """
    weight, bias = head

    def product(states: Tensor) -> Tensor:
        return (states.to(weight.dtype) @ weight.T).float()

    logits = product(student) if bias is None else product(student) + bias
    return [logits, *(logits + product(other.float() - student.float()) for other in others)]
