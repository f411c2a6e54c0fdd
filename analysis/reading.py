"""What student, teacher and target say at every token of sampled rollouts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from states import Scored, distilled, logits_of, reaching, score, steering_of

from ogls.data import RolloutDataModule
from ogls.lessons.prompts import PromptEncoder
from ogls.lessons.selection import token_span
from ogls.module import SelfDistillation
from ogls.records import Lesson, Problem, Rollout, RolloutGroup

COLUMNS = {"plain": "plain teacher", "success": "success pool", "failure": "failure pool", "idea": "idea"}
CHUNK_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token is shown as it was sampled.

    `piece` are its characters in the text, "" for an end token or the later bytes of a character; `name` is what the
    tokenizer calls it. `kl` is KL(target || student) in nats, None where no target was made. `chances` has, by column,
    the probability of this token, and `tops` the likeliest tokens with theirs.
    """

    name: str
    piece: str
    learned: bool
    error: bool
    kl: float | None = None
    chances: dict[str, float] | None = None
    tops: dict[str, list[tuple[str, float]]] | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A reading shows a rollout token by token."""

    rollout: Rollout
    tokens: tuple[Token, ...]

    @property
    def kl(self) -> float:
        """Returns the sum over the learned tokens."""
        return sum(token.kl or 0.0 for token in self.tokens if token.learned)


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page shows all groups of one step; its title says which method on which weights."""

    title: str
    groups: tuple[tuple[RolloutGroup, tuple[Reading, ...]], ...]


def read_step(model: SelfDistillation, data: RolloutDataModule, step: int | None, top: int) -> Page:
    """Samples the problems of an optimiser step, and scores every token of the rollouts that are distilled.

    `top` likeliest tokens are kept of each view; `step` None is the next step of the model.
    """
    batch = data.make_batch(model.policy.version if step is None else step)
    lessons = distilled(batch)
    whole = [reaching(lesson, len(lesson.token_ids)) for lesson in lessons]
    waiting: dict[tuple[str, tuple[int, ...]], list[tuple[Lesson, Scored]]] = defaultdict(list)
    for lesson, one in zip(lessons, score(model, whole, pools=True), strict=True):
        waiting[lesson.problem_id, lesson.token_ids].append((lesson, one))
    groups = []
    for group in batch.groups:
        readings = []
        for rollout in group.rollouts:
            queue = waiting[group.problem.id, rollout.completion.token_ids]
            lesson, one = queue.pop(0) if queue else (None, None)
            readings.append(_read(model, data, group.problem, rollout, lesson, one, top))
        groups.append((group, tuple(readings)))
    title = f"{model.method.name} · weights after {model.policy.version} steps"
    return Page(title=title, groups=tuple(groups))


def _read(
    model: SelfDistillation,
    data: RolloutDataModule,
    problem: Problem,
    rollout: Rollout,
    lesson: Lesson | None,
    one: Scored | None,
    top: int,
) -> Reading:
    ids = rollout.completion.token_ids
    text, offsets = data.encoder.decode_offsets(ids)
    span = None
    if data.method.reflector is not None:
        span = rollout.reflection.span if rollout.reflection else None
    elif data.locator is not None and not rollout.correct:
        span = data.locator.locate(problem, text)
    first, last = token_span(offsets, span) if span is not None else (0, 0)
    words = [None] * len(ids) if one is None else distributions(model, one, data.encoder, top)
    done, tokens = 0, []
    for t, (token, said) in enumerate(zip(ids, words, strict=True)):
        end = max(offsets[t][1], done)
        tokens.append(
            Token(
                name=name_of(data.encoder, token),
                piece=text[done:end],
                learned=lesson is not None and lesson.token_weights[t] != 0,
                error=first <= t < last,
                **(said or {}),
            )
        )
        done = end
    return Reading(rollout=rollout, tokens=tuple(tokens))


@torch.no_grad()
def distributions(model: SelfDistillation, one: Scored, encoder: PromptEncoder, top: int) -> list[dict]:
    """Returns `kl`, `chances` and `tops` of each scored token; columns student, the pools that there are, target."""
    device = model.policy.head[0].device
    steering = steering_of(model.method)
    alpha = steering.strength(one.anchor, one.direction, model.policy.version, model.policy.head)
    states = {"student": one.student}
    states |= {name: one.pools[role] for role, name in COLUMNS.items() if role in one.pools}
    states["target"] = one.anchor + alpha * one.direction
    ids = torch.tensor(one.lesson.token_ids[: len(one.anchor)], device=device)
    found = []
    for rows in torch.arange(len(ids), device=device).split(CHUNK_ROWS):
        logits = logits_of(model.policy.head, *(state[rows] for state in states.values()))
        logs = {name: z.log_softmax(-1) for name, z in zip(states, logits, strict=True)}
        kl = (logs["target"].exp() * (logs["target"] - logs["student"])).sum(-1).tolist()
        own = {name: log.gather(-1, ids[rows, None])[:, 0].exp().tolist() for name, log in logs.items()}
        best = {name: [part.tolist() for part in log.exp().topk(top)] for name, log in logs.items()}
        for row in range(len(rows)):
            tops = {
                name: [(name_of(encoder, i), p) for p, i in zip(chances[row], tokens[row], strict=True)]
                for name, (chances, tokens) in best.items()
            }
            found.append({"kl": kl[row], "chances": {name: p[row] for name, p in own.items()}, "tops": tops})
    return found


def name_of(encoder: PromptEncoder, token_id: int) -> str:
    return encoder.tokenizer.decode([token_id], skip_special_tokens=False)
