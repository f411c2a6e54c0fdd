"""The canary's first measure by itself: how far an engine is from a policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ogls.policy.policy import Policy
from ogls.records import Sampling
from ogls.rollout.canary import logprobs
from ogls.rollout.engine import RolloutEngine


def logprob_gap(engine: RolloutEngine, policy: Policy, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
    """The mean of |log p_engine(token) - log p_policy(token)| over tokens that the engine draws."""
    drawn = [c for (c,) in engine.generate(prompts, Sampling(max_tokens=max_tokens), 1, seed=0)]
    ours = torch.cat(logprobs(policy, prompts, [c.token_ids for c in drawn]))
    return float((torch.tensor([x for c in drawn for x in c.logprobs]) - ours).abs().mean())
