"""Does the engine sample from the weights that it should? The commonest silent disaster is that it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from ogls.engine.base import RolloutEngine, Sampling

if TYPE_CHECKING:
    from ogls.policy import Policy


def logprob_gap(engine: RolloutEngine, policy: Policy, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
    """Mean |log p_engine(token) - log p_policy(token)| of the tokens that the engine draws after each prompt.

    They are drawn, and not given: an engine that scores given tokens goes round its prefix cache, whose staleness is
    one of the things to be found.
    """
    drawn = engine.generate(prompts, Sampling(max_tokens=max_tokens), 1, seed=0)
    completions = [completion for (completion,) in drawn]
    suffixes = [completion.token_ids for completion in completions]
    weight, bias = policy.head
    with torch.no_grad():
        states = policy.hidden(prompts, suffixes, range(len(prompts)))
        logprobs = linear(states.to(weight.dtype), weight, bias).float().log_softmax(-1)
        ids = torch.tensor([i for suffix in suffixes for i in suffix], device=logprobs.device)
        theirs = torch.tensor([p for completion in completions for p in completion.logprobs], device=logprobs.device)
        return float((logprobs.gather(1, ids[:, None])[:, 0] - theirs).abs().mean())
