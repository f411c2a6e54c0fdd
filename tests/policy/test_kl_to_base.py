from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ogls.policy.kl_to_base import kl_to_base
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.records import Completion, Problem, Rollout, RolloutGroup, Verdict

PROMPTS = ((5, 6, 7), (9,))
COMPLETIONS = ((11, 12, 13, 14), (21, 22))


def groups() -> list[RolloutGroup]:
    made = []
    for number, (prompt, ids) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        rollouts = [
            Rollout(
                completion=Completion(token_ids=token_ids, logprobs=(-1.0,) * len(token_ids), finish_reason="stop"),
                text="",
                verdict=Verdict(correct=False, status="graded"),
            )
            for token_ids in (ids, (1, 2, 3))  # the second rollout is not looked at
        ]
        problem = Problem(id=f"p{number}", text="", answer="")
        made.append(RolloutGroup(problem=problem, prompt_ids=prompt, rollouts=tuple(rollouts), policy_version=0))
    return made


def change(policy: Policy) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.02 * torch.randn_like(parameter)


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=8)], ids=["full", "lora"])
def test_the_student_has_moved_as_far_as_full_logits_say(tiny_model: Path, lora: Lora | None):
    policy = Policy(str(tiny_model), lora=lora, dtype="float32").load()
    assert kl_to_base(policy, groups(), 1000, policy.at_start) == 0.0
    change(policy)
    student, base = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    own = student.state_dict()
    student.load_state_dict({name: dict(policy.merged_weights()).get(name, value) for name, value in own.items()})
    divergences = []
    for prompt, ids in zip(PROMPTS, COMPLETIONS, strict=True):
        with torch.no_grad():
            here, start = (
                model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                for model in (student, base)
            )
        divergences += (here.exp() * (here - start)).sum(-1).tolist()
    expected = sum(divergences) / len(divergences)
    assert expected > 0.01
    assert kl_to_base(policy, groups(), 1000, policy.at_start) == pytest.approx(expected, rel=1e-3)
    one_by_one = kl_to_base(policy, groups(), 1, policy.at_start)
    assert one_by_one == pytest.approx(expected, rel=1e-3)
