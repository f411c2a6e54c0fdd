"""Diagnostics measure on some tokens how far apart target and student are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ogls.loss.chunked import Head, accumulation_dtype, apply_head, check_states, logits_and_gaps
from ogls.loss.objective import per_token
from ogls.loss.steering import Steered
from ogls.loss.tiles import chunks
from ogls.records import Lesson

DIAGNOSTIC_ROWS = 32  # tokens per chunk; each keeps about ten fp32 rows of the vocabulary alive


@torch.no_grad()
def diagnose(
    lessons: Sequence[Lesson],
    hidden_student: Float[Tensor, "tokens hidden"],
    target: Steered,
    head: Head,
    marker_ids: Sequence[int],
    seed: int,
    num_tokens: int = 64,
) -> dict[str, Tensor]:
    """Returns the `diagnostics` of a random sample of a micro-batch's distilled tokens, by name.

    Where every token has an alpha of its own, ``alpha`` is added, with one value for each distilled token.

    Args:
        lessons: lessons of the micro-batch
        hidden_student: states of the student that predict their learned tokens
        target: anchor, direction and alpha of the target of these tokens
        head: weight and bias of the student's output head
        marker_ids: token ids of reflection markers
        seed: random seed of the sample
        num_tokens: largest size of the sample
    """
    taught = per_token(lessons, lambda lesson: [w * bool(lesson.views) for w in lesson.token_weights], hidden_student)
    taught, generator = taught.nonzero(), torch.Generator().manual_seed(seed)
    rows = taught[torch.randperm(len(taught), generator=generator)[:num_tokens].to(taught.device), 0]
    found, alpha, steer = {}, target.alpha, target.direction[rows]
    if isinstance(alpha, Tensor):  # one alpha per token: then the direction is measured with its alpha in it
        found["alpha"] = alpha[taught[:, 0]]
        steer, alpha = steer * alpha[rows], 1.0
    states = hidden_student[rows], target.anchor[rows], steer
    values = diagnostics(*states, alpha, *head, head_target=target.head, marker_ids=marker_ids)
    return found | {name: torch.tensor(value) for name, value in values.items()}


@torch.no_grad()
def diagnostics(
    hidden_student: Float[Tensor, "tokens hidden"],
    hidden_anchor: Float[Tensor, "tokens hidden_target"],
    hidden_direction: Float[Tensor, "tokens hidden_target"],
    alpha: float,
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    temperature: float = 1.0,
    marker_ids: Sequence[int] | None = None,
    head_target: Head | None = None,
) -> dict[str, float]:
    """Returns how far target, anchor and student are apart, as means over the given tokens by name.

    p0 = softmax(anchor's logits), Delta = W direction, target ∝ p0 exp(alpha Delta); all logits are divided by the
    temperature. KLs and entropies are in nats; masses and ``tv_target_anchor``, a total variation, are in [0, 1].
    ``delta_std`` is the standard deviation of Delta under p0, and ``delta_range`` is max Delta - min Delta over the
    vocabulary. ``hoeffding_bound`` = alpha² range² / 8 >= KL(target || anchor). Some hundreds of tokens are enough for
    a stable mean; without tokens the result is empty.

    Args:
        hidden_student: states of the student
        hidden_anchor: states of the target before steering
        hidden_direction: states to steer along
        alpha: strength of the steering
        weight: weight of the student's output head
        bias: bias of the student's output head; None where it has none
        temperature: divisor of all logits
        marker_ids: token ids whose mass under target and student is measured too; None measures none
        head_target: weight and bias of the head of anchor and direction; None is the student's
    """
    check_states(hidden_student, weight, bias, hidden_target=hidden_anchor, head_target=head_target)
    found: dict[str, Tensor] = {}
    accurate = accumulation_dtype(weight)
    weight_target = weight if head_target is None else head_target[0]
    for rows, buffers in chunks(len(hidden_student), weight, 3, DIAGNOSTIC_ROWS):
        student, gap, steer = buffers
        logits_and_gaps(hidden_student[rows], hidden_anchor[rows], weight, bias, None, buffers[:2], head_target)
        apply_head(hidden_direction[rows], weight_target, None, out=steer)
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
