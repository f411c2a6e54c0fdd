from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.teacher import EMA, Frozen, Live, Teacher, TrustRegion

PREFIXES, SUFFIXES, OWNERS = [[5, 6, 7], [40, 41]], [[11, 12, 13], [21, 22], [31]], [0, 0, 1]


def states(policy: Policy) -> Tensor:
    return policy.hidden(PREFIXES, SUFFIXES, OWNERS)


def taught(teacher: Teacher, policy: Policy) -> Tensor:
    with teacher.weights(policy):
        found = states(policy)
    assert not found.requires_grad
    assert states(policy).requires_grad
    return found


def sha256(tensors: list[Tensor]) -> str:
    return hashlib.sha256(
        b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    ).hexdigest()


def train(policy: Policy, teacher: Teacher, steps: int) -> None:
    """Steps that really move the student away from its teacher."""
    optimiser = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
    for _ in range(steps):
        target = taught(teacher, policy)
        (states(policy) - 2 * target).float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        teacher.update(policy)


@pytest.mark.parametrize("teacher", [Frozen(), Live(), EMA(0.5), TrustRegion()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("lora", [Lora(rank=4), Lora(rank=2, targets=("q_proj", "v_proj"))], ids=["all", "attention"])
def test_the_base_is_the_same_to_the_last_bit_after_training(tiny_model: Path, lora: Lora, teacher: Teacher) -> None:
    policy = Policy(tiny_model, lora=lora)
    teacher.start(policy)
    base = [p for p in policy.model.parameters() if not p.requires_grad]
    start, before = states(policy).detach(), sha256(base)
    train(policy, teacher, steps=3)
    for _ in policy.merged_weights():  # as an engine takes them
        pass
    assert sha256([p for p in policy.model.parameters() if not p.requires_grad]) == before
    with policy.without_adapter():
        assert torch.equal(states(policy), start)
    assert not torch.equal(states(policy), start)


@pytest.mark.parametrize("lora", [Lora(rank=4), None])
def test_frozen_teacher_never_moves(tiny_model: Path, lora: Lora | None) -> None:
    policy, teacher = Policy(tiny_model, lora=lora, dtype="float32"), Frozen()
    teacher.start(policy)
    names = list(policy.trainable())
    frozen = [p for name, p in policy.model.named_parameters() if name not in names]
    first, weights = sha256([taught(teacher, policy)]), sha256(frozen)
    start = states(policy).detach()
    train(policy, teacher, steps=10)
    assert (states(policy) - start).abs().max() > 0.1
    assert sha256([taught(teacher, policy)]) == first
    assert sha256(frozen) == weights
    assert list(policy.trainable()) == names
    assert all(p.requires_grad for p in policy.trainable().values())
    assert teacher.state_dict() == {}


def test_frozen_teacher_of_full_weights_is_the_folder_even_when_started_late(tiny_model: Path) -> None:
    policy, teacher = Policy(tiny_model, dtype="float32"), Frozen()
    start = states(policy).detach()
    train(policy, Live(), steps=2)
    teacher.start(policy)
    torch.testing.assert_close(taught(teacher, policy), start, atol=0, rtol=0)


def test_live_teacher_is_the_student(tiny_model: Path) -> None:
    policy, teacher = Policy(tiny_model, lora=Lora(rank=4), dtype="float32"), Live()
    teacher.start(policy)
    train(policy, teacher, steps=2)
    assert torch.equal(taught(teacher, policy), states(policy))


def test_ema_follows_by_its_formula_and_survives_a_checkpoint(tiny_model: Path) -> None:
    policy, teacher = Policy(tiny_model, lora=Lora(rank=4), dtype="float32"), EMA(decay=0.75)
    teacher.start(policy)
    expected = {name: p.detach().clone() for name, p in policy.trainable().items()}
    for step in range(3):
        for p in policy.trainable().values():
            p.data += 0.1 * (step + 1)
        teacher.update(policy)
        expected = {n: 0.75 * mean + 0.25 * policy.trainable()[n].detach() for n, mean in expected.items()}
    for name, mean in teacher.state_dict().items():
        torch.testing.assert_close(mean, expected[name])
    resumed = EMA(decay=0.75)
    resumed.start(policy)
    assert not torch.equal(taught(resumed, policy), taught(teacher, policy))
    resumed.load_state_dict(teacher.state_dict())
    assert torch.equal(taught(resumed, policy), taught(teacher, policy))


@pytest.mark.parametrize("lora", [Lora(rank=4), None])
def test_the_trust_region_lies_between_start_and_student(tiny_model: Path, lora: Lora | None) -> None:
    policy, teacher = Policy(tiny_model, lora=lora, dtype="float32"), TrustRegion(share=0.25)
    teacher.start(policy)
    start = states(policy).detach()
    assert torch.equal(taught(teacher, policy), start)
    train(policy, teacher, steps=3)
    student, between = states(policy).detach(), taught(teacher, policy)
    torch.testing.assert_close(between, 0.75 * start + 0.25 * student)
    head = policy.head[0].double()
    ps, p0, p1 = ((x.double() @ head.T).softmax(-1) for x in (between, start, student))
    expected = p0**0.75 * p1**0.25
    torch.testing.assert_close(ps, expected / expected.sum(-1, keepdim=True), rtol=1e-4, atol=1e-7)
    assert torch.equal(states(policy).detach(), student)
    with pytest.raises(ValueError, match="share must be in"):
        TrustRegion(share=1.5)


@pytest.mark.parametrize("teacher", [Frozen(), TrustRegion()], ids=["frozen", "trust region"])
def test_student_is_itself_again_after_an_error(tiny_model: Path, teacher: Teacher) -> None:
    policy = Policy(tiny_model, lora=Lora(rank=4), dtype="float32")
    teacher.start(policy)
    train(policy, teacher, steps=1)
    before = states(policy)
    with pytest.raises(RuntimeError, match="lost"), teacher.weights(policy):
        raise RuntimeError("lost")
    assert torch.equal(states(policy), before)


def test_states_of_another_teacher_are_refused(tiny_model: Path) -> None:
    policy, teacher = Policy(tiny_model, lora=Lora(rank=4), dtype="float32"), EMA()
    teacher.start(policy)
    with pytest.raises(ValueError, match="another teacher"):
        Frozen().load_state_dict(teacher.state_dict())
    with pytest.raises(ValueError, match="expected the averages"):
        teacher.load_state_dict({})
    with pytest.raises(ValueError, match="decay must be in"):
        EMA(decay=1.5)
