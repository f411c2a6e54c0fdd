"""The policy itself samples rollouts, with nothing but torch and transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear

from ogls.records import Completion, Sampling
from ogls.rollout.engine import RolloutEngine, prompt_seeds, thought_length
from ogls.system.seeds import derive

if TYPE_CHECKING:
    from ogls.policy.policy import Policy


class TransformersEngine(RolloutEngine):
    """This engine samples with the policy itself, one token at a time for a padded batch of sequences.

    There are no weights to copy, so that `load` costs nothing. What is drawn after a prompt is a function of the seed
    and the prompt; `batch_size` changes it by no more than rounding.

    Args:
        batch_size: sequences that are sampled side by side
    """

    copies_policy = False

    def __init__(self, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self._policy: Policy | None = None

    def _start(self, folder: Path, context_length: int) -> None:
        self._folder = folder

    def _load(self, policy: Policy) -> None:
        if policy.folder != self._folder:
            raise ValueError(f"the engine was started with {self._folder}, got a policy of {policy.folder}")
        self._policy = policy

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        assert self._policy is not None
        seeds = prompt_seeds(prompts, seed)
        rows = [(i, k) for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])) for k in range(n)]
        done: list[list[Completion]] = [[] for _ in prompts]
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            owners = [i for i, _ in some]
            draws = [random.Random(derive(seeds[i], k)) for i, k in some]
            for i, completion in zip(owners, self._decode(prompts, owners, sampling, draws), strict=True):
                done[i].append(completion)
        return done

    def _close(self) -> None:
        self._policy = None

    @torch.no_grad()
    def _decode(
        self, prompts: Sequence[Sequence[int]], owners: list[int], sampling: Sampling, draws: list[random.Random]
    ) -> list[Completion]:
        """Returns one completion of the prompt that each of `owners` names, by its own generator of `draws`.

        Each prompt is read once, and rows that have ended leave the batch.
        """
        assert self._policy is not None
        policy = self._policy
        weight, bias = policy.head
        device = weight.device
        end = torch.tensor(self._end_token_ids, device=device)
        used = list(dict.fromkeys(owners))
        ids, mask = (x.to(device) for x in _left_padded([prompts[i] for i in used]))
        out = policy.trunk(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True
        )
        of = torch.tensor([used.index(i) for i in owners], device=device)
        cache, mask, states = out.past_key_values, mask[of], out.last_hidden_state[of, -1]
        cache.batch_select_indices(of)
        running = torch.arange(len(owners), device=device)
        token_ids: list[list[int]] = [[] for _ in owners]
        logprobs: list[list[float]] = [[] for _ in owners]
        budget, thought_ids = sampling.thinking_token_budget, self.thought_ids
        thoughts = [thought_length(prompts[i], thought_ids) if thought_ids else None for i in owners]
        for step in range(sampling.max_tokens):
            self.beat()
            uniform = torch.tensor(
                [draws[row].random() for row in running.tolist()], dtype=torch.float64, device=device
            )
            logits = linear(states.to(weight.dtype), weight, bias).float()
            if budget is not None and thought_ids:
                lengths = [thoughts[row] for row in running.tolist()]
                over = torch.tensor([length is not None and length >= budget for length in lengths], device=device)
                logits = forced(logits, over, thought_ids[1])
            tokens, drawn = draw(logits, sampling, uniform)
            for row, token, logprob in zip(running.tolist(), tokens.tolist(), drawn.tolist(), strict=True):
                token_ids[row].append(token)
                logprobs[row].append(logprob)
                thoughts[row] = thought_length([token], thought_ids, thoughts[row]) if thought_ids else None
            going = ~torch.isin(tokens, end)
            if step + 1 == sampling.max_tokens or not going.any():
                break
            if not going.all():
                cache.batch_select_indices(going.nonzero()[:, 0])
                running, tokens, mask = running[going], tokens[going], mask[going]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            states = policy.trunk(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        return [
            Completion(
                token_ids=tuple(ids),
                logprobs=tuple(logs),
                finish_reason="stop" if ids[-1] in self._end_token_ids else "length",
            )
            for ids, logs in zip(token_ids, logprobs, strict=True)
        ]


def draw(
    logits: Float[Tensor, "rows vocab"], sampling: Sampling, uniform: Float[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Returns one token per row, and its log-probability under the distribution that it was drawn from.

    The token is the first at which the cumulative probability exceeds the row's uniform number. At temperature 0 it is
    the likeliest token, with its log-probability at temperature 1.

    Args:
        logits: logits of the next token
        sampling: rule by which tokens are drawn
        uniform: numbers in [0, 1), one per row
    """
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
    else:
        logprobs = _cut(logits / sampling.temperature, sampling).log_softmax(-1)
        mass = logprobs.double().exp().cumsum(-1)
        tokens = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)[:, 0]
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def forced(logits: Float[Tensor, "rows vocab"], over: Bool[Tensor, " rows"], token: int) -> Float[Tensor, "rows vocab"]:
    """Returns logits by which the rows in `over` draw `token` for certain."""
    logits = logits.masked_fill(over[:, None], -torch.inf)
    logits[over, token] = 0.0
    return logits


def _cut(logits: Tensor, sampling: Sampling) -> Tensor:
    """Returns logits with -inf for what `top_k` and then `top_p` leave out.

    `top_p` keeps the smallest set of tokens that has at least this mass.
    """
    if 0 < sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        out = (probabilities.cumsum(-1) - probabilities) >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
    return logits


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
