"""How far apart target, anchor and student are, measured on some tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ogls.loss.alpha_bound import Head
from ogls.loss.chunked import accumulation_dtype, apply_head, check_states
from ogls.loss.objective import per_token
from ogls.loss.steering import Steered
from ogls.loss.tiles import chunks
from ogls.records import Lesson

DIAGNOSTIC_ROWS = 32  # tokens at a time; about ten fp32 rows of the vocabulary are alive for each


@torch.no_grad()
def diagnose(
    lessons: Sequence[Lesson],
    hidden_student: Tensor,
    target: Steered,
    head: Head,
    marker_ids: Sequence[int],
    seed: int,
    num_tokens: int = 64,
) -> dict[str, Tensor]:
    """Returns what the target is, by `diagnostics`, on distilled tokens of a micro-batch that follow from the seed.

    Args:
        lessons: the micro-batch
        hidden_student: states [tokens, hidden] of its learned tokens
        target: what the method's steering made of the views
        head: weight and bias of the output head
        marker_ids: tokens that are reflection markers
        seed: decides which tokens are taken
        num_tokens: how many
    """
    taught = per_token(lessons, lambda lesson: [w * bool(lesson.views) for w in lesson.token_weights], hidden_student)
    taught, generator = taught.nonzero(), torch.Generator().manual_seed(seed)
    rows = taught[torch.randperm(len(taught), generator=generator)[:num_tokens].to(taught.device), 0]
    found, alpha, steer = {}, target.alpha, target.direction[rows]
    if isinstance(alpha, Tensor):  # one for each token: what is diagnosed is the steering as it is applied
        found["alpha"] = alpha[taught[:, 0]]
        steer, alpha = steer * alpha[rows], 1.0
    values = diagnostics(hidden_student[rows], target.anchor[rows], steer, alpha, *head, marker_ids=marker_ids)
    return found | {name: torch.tensor(value) for name, value in values.items()}


@torch.no_grad()
def diagnostics(
    hidden_student: Tensor,
    hidden_anchor: Tensor,
    hidden_direction: Tensor,
    alpha: float,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float = 1.0,
    marker_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """How far target, anchor and student are apart: means over the tokens given (some hundreds do; none give {}).

    p0 = softmax of the anchor's logits, Delta = W direction, target ∝ p0 exp(alpha Delta), everything / temperature.
    `delta_std` is the standard deviation of Delta under p0, `delta_range` max - min over the vocabulary, and
    `hoeffding_bound` = alpha² range² / 8 >= KL(target || anchor). In nats; masses and `tv_target_anchor` in [0, 1].
    """
    check_states(hidden_student, weight, bias, hidden_target=hidden_anchor)
    found: dict[str, Tensor] = {}
    accurate = accumulation_dtype(weight)
    for rows, (student, gap, steer) in chunks(len(hidden_student), weight, 3, DIAGNOSTIC_ROWS):
        apply_head(hidden_student[rows], weight, bias, out=student)
        apply_head(hidden_anchor[rows].to(accurate) - hidden_student[rows].to(accurate), weight, None, out=gap)
        apply_head(hidden_direction[rows], weight, None, out=steer)
        z, delta = student.to(accurate) / temperature, steer.to(accurate) / temperature
        z0 = z + gap.to(accurate) / temperature
        log_student, log_anchor, log_target = (x.log_softmax(-1) for x in (z, z0, z0 + alpha * delta))
        student_p, anchor_p, target_p = log_student.exp(), log_anchor.exp(), log_target.exp()
        spread = delta.amax(-1) - delta.amin(-1)
        centred = delta - (anchor_p * delta).sum(-1, keepdim=True)
        values = {
            "kl_target_student": (target_p * (log_target - log_student)).sum(-1),
            "kl_target_anchor": (target_p * (log_target - log_anchor)).sum(-1),
            "hoeffding_bound": (alpha * spread) ** 2 / 8,
            "tv_target_anchor": (target_p - anchor_p).abs().sum(-1) / 2,
            "target_entropy": -(target_p * log_target).sum(-1),
            "student_entropy": -(student_p * log_student).sum(-1),
            "delta_std": (anchor_p * centred**2).sum(-1).sqrt(),
            "delta_range": spread,
        }
        if marker_ids:
            values["marker_mass_target"] = target_p[:, list(marker_ids)].sum(-1)
            values["marker_mass_student"] = student_p[:, list(marker_ids)].sum(-1)
        for name, value in values.items():
            found[name] = found.get(name, value.new_zeros(())) + value.sum()
    return {name: total.item() / len(hidden_student) for name, total in found.items()}
