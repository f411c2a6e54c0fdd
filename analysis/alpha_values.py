"""Quantities of the steered target for many alphas, from anchor and direction states alone.

A *right text* is a right rollout of the group or the reference solution. A wrong rollout leaves the nearest one at
its *fork*, the first token that it does not share with it. There the right token is known, and at all tokens before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from states import Scored, logits_of
from torch import Tensor

from ogls.data import RolloutDataModule
from ogls.loss.alpha_bound import Head
from ogls.records import Lesson, RolloutGroup

CHUNK_ROWS = 16
WEIGHING = {  # which tokens each quantity is a mean over
    "kl_target_student": "distilled",
    "kl_target_plain": "distilled",
    "hoeffding_bound": "distilled",
    "target_entropy": "distilled",
    "log_p_right": "known",
    "p_right": "fork",
    "p_rollout": "fork",
}
Texts = Sequence[Sequence[int]]
Sums = Mapping[str, tuple[np.ndarray, np.ndarray]]


def fork(token_ids: Sequence[int], right: Texts) -> tuple[int, set[int]]:
    """Returns the length of the longest prefix shared with a right text, and the tokens that go on from there in such
    texts.

    The set is empty where the rollout ends there, or is the right text itself.
    """

    def shared(text: Sequence[int]) -> int:
        shorter = min(len(token_ids), len(text))
        return next((i for i in range(shorter) if token_ids[i] != text[i]), shorter)

    place = max(map(shared, right), default=0)
    following = {text[place] for text in right if shared(text) == place < len(text)}
    return place, following if place < len(token_ids) else set()


def right_texts(data: RolloutDataModule, groups: Sequence[RolloutGroup]) -> dict[str, Texts]:
    """Returns token ids of the right texts, by problem."""
    found: dict[str, Texts] = {}
    for group in groups:
        texts = [rollout.completion.token_ids for rollout in group.successes]
        solution = group.problem.solution
        found[group.problem.id] = texts if solution is None else [*texts, data.encoder.completion(solution)]
    return found


@torch.no_grad()
def token_values(
    one: Scored, place: int, following: set[int], alphas: Sequence[float], head: Head
) -> dict[str, np.ndarray]:
    """Returns each quantity [tokens, alphas] of a lesson's scored tokens; -inf or 0 where no right token is known."""
    weight, _ = head
    right = torch.zeros(len(one.anchor), len(weight), dtype=torch.bool, device=weight.device)
    for t, token in enumerate(one.lesson.token_ids[: min(place, len(right))]):
        right[t, token] = True
    if place < len(right):
        right[place, sorted(following)] = True
    own = torch.tensor(one.lesson.token_ids[: len(right)], device=weight.device)[:, None]
    pieces: dict[str, list[Tensor]] = {name: [] for name in WEIGHING}
    for rows in torch.arange(len(right), device=weight.device).split(CHUNK_ROWS):
        z, z0 = logits_of(head, one.student[rows], one.anchor[rows])
        delta = (one.direction[rows].to(weight.dtype) @ weight.T).float()
        log_student, log_plain = z.log_softmax(-1), z0.log_softmax(-1)
        spread = delta.amax(-1) - delta.amin(-1)
        found: dict[str, list[Tensor]] = {name: [] for name in WEIGHING}
        for alpha in alphas:
            log_target = (z0 + alpha * delta).log_softmax(-1)
            target, log_right = log_target.exp(), log_target.masked_fill(~right[rows], -torch.inf).logsumexp(-1)
            found["kl_target_student"].append((target * (log_target - log_student)).sum(-1))
            found["kl_target_plain"].append((target * (log_target - log_plain)).sum(-1))
            found["hoeffding_bound"].append((alpha * spread) ** 2 / 8)
            found["target_entropy"].append(-(target * log_target).sum(-1))
            found["log_p_right"].append(log_right)
            found["p_right"].append(log_right.exp())
            found["p_rollout"].append(target.gather(-1, own[rows])[:, 0])
        for name, columns in found.items():
            pieces[name].append(torch.stack(columns, -1))
    return {name: torch.cat(parts).cpu().numpy() for name, parts in pieces.items()}


def collect(
    lessons: Sequence[Lesson],
    scored: Sequence[Scored],
    rights: Mapping[str, Texts],
    alphas: Sequence[float],
    head: Head,
) -> Sums:
    """Returns by quantity the sums over a problem's tokens of weight x value [problems, alphas] and of weight
    [problems, 1].

    `lessons` have the weights of the loss; `scored` are the same lessons, scored up to the fork at least.
    """
    problems = list(dict.fromkeys(lesson.problem_id for lesson in lessons))
    sums = {name: (np.zeros((len(problems), len(alphas))), np.zeros((len(problems), 1))) for name in WEIGHING}
    for lesson, one in zip(lessons, scored, strict=True):
        place, following = fork(lesson.token_ids, rights[lesson.problem_id])
        at = np.arange(len(one.anchor))
        distilled = np.array(lesson.token_weights[: len(at)])
        at_fork = (at == place) & bool(following)
        weights = {"distilled": distilled, "known": distilled * ((at < place) | at_fork), "fork": 1.0 * at_fork}
        row = problems.index(lesson.problem_id)
        for name, value in token_values(one, place, following, alphas, head).items():
            weight = weights[WEIGHING[name]][:, None]
            sums[name][0][row] += (weight * np.where(weight > 0, value, 0.0)).sum(0)
            sums[name][1][row] += weight.sum()
    return sums
