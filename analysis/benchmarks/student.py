"""The student's pass, forward and backward with the loss: packed and shared against padded batches with all logits.

    python analysis/benchmarks/student.py                        # embedded model, 8 rollouts of a prompt, 120 tokens
    python analysis/benchmarks/student.py --groups 4 --group-size 4

Every side starts from the same token ids and target states and ends with the gradient of the adapter. `padded, all
logits` is the usual way: transformers' own pass over right-padded rows, the logits of every position of student and
target, autograd; where TRL is installed its full-logits divergence takes the place of the formula. Losses are compared
before anything is timed. Peak memory is that of a second step over what was held before it.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable

import torch
from harness import announce, installed, log, parser, peak_mib, report, time_sides
from rows import lessons
from torch import Tensor

from ogls.loss.chunked import chunked_divergence
from ogls.loss.divergence import ForwardKL
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.pretrained import EMBEDDED
from ogls.records import Lesson


def ours(policy: Policy, batch: list[Lesson], target: Tensor, share: bool) -> float:
    prompts = list(dict.fromkeys(lesson.prompt_ids for lesson in batch))
    owners = [prompts.index(lesson.prompt_ids) for lesson in batch]
    student = policy.hidden(prompts, [lesson.token_ids for lesson in batch], owners, share_prefixes=share)
    weight, bias = policy.head
    values, _ = chunked_divergence(student, target, weight, bias, ForwardKL())
    return backward(policy, values.mean())


def padded(policy: Policy, batch: list[Lesson], target: Tensor) -> float:
    longest = max(len(lesson.prompt_ids) + len(lesson.token_ids) for lesson in batch)
    ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.long)
    for row, lesson in enumerate(batch):
        ids[row, : len(lesson.prompt_ids) + len(lesson.token_ids)] = torch.tensor(lesson.prompt_ids + lesson.token_ids)
        mask[row, : len(lesson.prompt_ids) + len(lesson.token_ids)] = 1
    logits = policy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cut = [slice(len(lesson.prompt_ids) - 1, len(lesson.prompt_ids) + len(lesson.token_ids) - 1) for lesson in batch]
    log_p = torch.cat([rows[at] for rows, at in zip(logits, cut, strict=True)]).float().log_softmax(-1)
    log_q = (target.to(policy.head[0].dtype) @ policy.head[0].T).float().log_softmax(-1)
    return backward(policy, full_logits_divergence(log_p, log_q))


def full_logits_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    if installed("trl"):
        from trl.experimental.sdpo.loss_utils import (  # pyright: ignore[reportMissingImports]
            compute_full_logit_self_distillation_loss,
        )

        return compute_full_logit_self_distillation_loss(log_p, log_q, distillation_alpha=0.0).mean()
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def backward(policy: Policy, loss: Tensor) -> float:
    loss.backward()
    for p in policy.trainable().values():
        p.grad = None
    return loss.item()


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--model", default=EMBEDDED)
    options.add_argument("--groups", type=int, default=1)
    options.add_argument("--group-size", type=int, default=8)
    options.add_argument("--prompt", type=int, default=70)
    options.add_argument("--length", type=int, default=120)
    args = options.parse_args()
    announce(args)
    policy = Policy(args.model, lora=Lora()).load()
    batch = lessons(args.groups, args.group_size, args.prompt, args.length, 0, len(policy.head[0]))
    tokens = sum(len(lesson.token_ids) for lesson in batch)
    with torch.no_grad():
        owners = list(range(len(batch)))
        states = policy.hidden([x.prompt_ids for x in batch], [x.token_ids for x in batch], owners).float()
        target = states + 0.1 * states.std() * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    checkpointing = Policy(args.model, lora=Lora(), gradient_checkpointing=True).load()
    table: dict[str, Callable[[], float]] = {
        "ours": functools.partial(ours, policy, batch, target, True),
        "ours, prompts unshared": functools.partial(ours, policy, batch, target, False),
        "ours, gradient checkpointing": functools.partial(ours, checkpointing, batch, target, True),
        "padded, all logits": functools.partial(padded, policy, batch, target),
    }
    losses = {name: side() for name, side in table.items()}
    print(f"{tokens} tokens learned, losses", {name: round(loss, 5) for name, loss in losses.items()})
    assert max(losses.values()) < 1.05 * min(losses.values()), "the sides do not compute the same"
    gc.collect()
    peaks = {name: functools.partial(peak_mib, side) for name, side in table.items()}
    figures = report(time_sides(table, args), "ours", args, peaks)
    log("student", figures, args)


if __name__ == "__main__":
    main()
