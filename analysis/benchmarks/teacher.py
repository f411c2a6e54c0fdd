"""Scoring views: shared prefixes against unshared ones, padded batches, and TRL's way.

    python analysis/benchmarks/teacher.py                               # embedded model, G=8, K=2 views of 190 tokens
    python analysis/benchmarks/teacher.py --group-size 16 --length 120 --views 8

Every side gives the same final-norm states of the same tokens (asserted before anything is timed); the target is the
sum that the steering asks for. `padded` is the usual way: each pair of a view and a rollout as one right-padded row of
transformers' own pass, in batches of the same token budget. `TRL's way` makes the calls of TRL 1.16's SDPOTrainer
(`_forward_logits`) for each pair: rows padded on both sides, logits of the longest completion for every row, over the
temperature; it gives the target's logits instead of its states, which the head makes of ours for the comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from harness import announce, log, parser, report, time_sides
from rows import lessons
from torch import Tensor

from ogls.loss.steering import OutcomeSteering, Steering
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.pretrained import EMBEDDED
from ogls.policy.states import view_states
from ogls.records import Lesson

BUDGET = 8192
Pair = tuple[
    int, tuple[int, ...], tuple[int, ...], float
]  # row of the rollout, the view's tokens, its own, coefficient
Read = Callable[[Policy, list[Pair]], list[Tensor]]


def shared(policy: Policy, steering: Steering, batch: list[Lesson]) -> Tensor:
    with policy.without_adapter():
        num_scored = [lesson.num_learned for lesson in batch]
        anchor, direction = view_states(policy, steering, batch, num_scored, BUDGET)
    return anchor + direction


def one_by_one(policy: Policy, steering: Steering, batch: list[Lesson], padded: bool) -> Tensor:
    """Reads every pair of a view and a rollout from its beginning."""
    states = padded_states if padded else packed_states
    return added(policy, steering, batch, states, policy.head[0].shape[1])


def trls_way(policy: Policy, steering: Steering, batch: list[Lesson]) -> None:
    """Makes TRL's calls without summing the views' logits, which TRL has no need of and which would add to its time."""
    with torch.no_grad(), policy.without_adapter():
        for some in batches(steering, batch):
            padded_logits(policy, some)


def added(policy: Policy, steering: Steering, batch: list[Lesson], read: Read, width: int) -> Tensor:
    """Returns what `read` finds for each pair of a view and a rollout, times its coefficient, summed over views."""
    lengths = [len(lesson.token_ids) for lesson in batch]
    total = torch.zeros(sum(lengths), width)
    pieces = total.split(lengths)
    with torch.no_grad(), policy.without_adapter():
        for some in batches(steering, batch):
            for found, (row, _, _, coefficient) in zip(read(policy, some), some, strict=True):
                pieces[row].add_(found, alpha=coefficient)
    return total


def batches(steering: Steering, batch: list[Lesson]) -> Iterator[list[Pair]]:
    """Yields all pairs by length, so many at once as fit the budget when padded."""
    pairs: list[Pair] = []
    for row, lesson in enumerate(batch):
        coefficients = steering.coefficients([view.role for view in lesson.views])
        for view, a, d in zip(lesson.views, *coefficients, strict=True):
            if a or d:
                pairs.append((row, view.prefix_ids, lesson.token_ids, a + d))
    pairs.sort(key=lambda pair: len(pair[1]) + len(pair[2]))
    rows = max(1, BUDGET // (len(pairs[-1][1]) + len(pairs[-1][2])))
    for start in range(0, len(pairs), rows):
        yield pairs[start : start + rows]


def packed_states(policy: Policy, pairs: list[Pair]) -> list[Tensor]:
    owners = list(range(len(pairs)))
    states = policy.hidden([p[1] for p in pairs], [p[2] for p in pairs], owners, share_prefixes=False)
    return list(states.split([len(p[2]) for p in pairs]))


def padded_states(policy: Policy, pairs: list[Pair]) -> list[Tensor]:
    longest = max(len(prefix) + len(tokens) for _, prefix, tokens, _ in pairs)
    ids, mask = torch.zeros(2, len(pairs), longest, dtype=torch.long)
    for row, (_, prefix, tokens, _) in enumerate(pairs):
        ids[row, : len(prefix) + len(tokens)] = torch.tensor([*prefix, *tokens])
        mask[row, : len(prefix) + len(tokens)] = 1
    states = policy.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return [s[len(prefix) - 1 :][: len(tokens)] for s, (_, prefix, tokens, _) in zip(states, pairs, strict=True)]


def padded_logits(policy: Policy, pairs: list[Pair]) -> list[Tensor]:
    longest_prefix, longest = (max(len(pair[i]) for pair in pairs) for i in (1, 2))
    ids, mask = torch.zeros(2, len(pairs), longest_prefix + longest, dtype=torch.long)
    for row, (_, prefix, tokens, _) in enumerate(pairs):
        written = slice(longest_prefix - len(prefix), longest_prefix + len(tokens))
        ids[row, written] = torch.tensor([*prefix, *tokens])
        mask[row, written] = 1
    logits = policy.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=longest + 1).logits
    logits = logits[:, :-1] / 1.0
    return [row[: len(tokens)] for row, (_, _, tokens, _) in zip(logits, pairs, strict=True)]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--model", default=EMBEDDED)
    options.add_argument("--groups", type=int, default=1)
    options.add_argument("--group-size", type=int, default=8)
    options.add_argument("--prompt", type=int, default=70)
    options.add_argument("--length", type=int, default=120)
    options.add_argument("--views", type=int, default=2)
    args = options.parse_args()
    announce(args)
    policy = Policy(args.model, lora=Lora()).load()
    vocab = len(policy.head[0])
    batch = lessons(args.groups, args.group_size, args.prompt, args.length, args.views, vocab)
    steering = OutcomeSteering(alpha=1.0)
    run = sum(len(v) + len(t) for v, t in tokens_of(batch))
    read = sum(len(v) for v in {v for v, _ in tokens_of(batch)}) + sum(len(t) for _, t in tokens_of(batch))
    print(f"tokens unshared {run}, shared {read}: {run / read:.2f}")
    table = {
        "shared prefixes": functools.partial(shared, policy, steering, batch),
        "unshared, packed": functools.partial(one_by_one, policy, steering, batch, False),
        "unshared, padded": functools.partial(one_by_one, policy, steering, batch, True),
    }
    truth = table["unshared, padded"]()
    for name, side in table.items():
        off = float((side() - truth).norm() / truth.norm())
        assert off < 0.03, f"{name} is {off:.1%} off: bf16 rounds other layouts otherwise, but not as much"
        print(f"{name}: {off:.2%} from the padded states")
    weight, _ = policy.head
    of_states, theirs = truth.to(weight.dtype) @ weight.T, added(policy, steering, batch, padded_logits, vocab)
    off = float((theirs - of_states).norm() / of_states.norm())
    assert off < 0.03, f"TRL's way is {off:.1%} off"
    table["TRL's way"] = functools.partial(trls_way, policy, steering, batch)
    figures = report(time_sides(table, args), "shared prefixes", args)
    log("teacher", figures | {"token ratio": run / read}, args)


def tokens_of(batch: list[Lesson]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(view.prefix_ids, lesson.token_ids) for lesson in batch for view in lesson.views]


if __name__ == "__main__":
    main()
