from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ogls.policy.lora import Lora
from ogls.policy.policy import Dtype, Policy
from ogls.policy.teacher import EMA, Frozen, Live, Teacher, TrustRegion, Weights

LORA = Lora(rank=4)
PREFIXES, SUFFIXES, OWNERS = [[5, 6, 7], [40, 41]], [[11, 12, 13], [21, 22], [31]], [0, 0, 1]


def states(policy: Policy) -> Tensor:
    return policy.hidden(PREFIXES, SUFFIXES, OWNERS)


def loaded(folder: Path, lora: Lora | None = LORA, dtype: Dtype = "float32") -> Policy:
    return Policy(str(folder), lora=lora, dtype=dtype).load()


def taught(teacher: Teacher, policy: Policy, kept: Weights) -> Tensor:
    with teacher.applied_to(policy, kept):
        found = states(policy)
    assert not found.requires_grad
    assert states(policy).requires_grad
    return found


def sha256(tensors: list[Tensor]) -> str:
    return hashlib.sha256(
        b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    ).hexdigest()


def train(policy: Policy, teacher: Teacher, kept: Weights, steps: int) -> None:
    """Steps that really move the student away from its teacher."""
    optimiser = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
    for _ in range(steps):
        target = taught(teacher, policy, kept)
        (states(policy) - 2 * target).float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        teacher.update(policy, kept)


@pytest.mark.parametrize("teacher", [Frozen(), Live(), EMA(0.5), TrustRegion()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("lora", [Lora(rank=4), Lora(rank=2, targets=("q_proj", "v_proj"))], ids=["all", "attention"])
def test_the_base_is_the_same_to_the_last_bit_after_training(tiny_model: Path, lora: Lora, teacher: Teacher) -> None:
    policy = loaded(tiny_model, lora, "bfloat16")
    kept = teacher.start(policy)
    base = [p for p in policy.model.parameters() if not p.requires_grad]
    start, before = states(policy).detach(), sha256(base)
    train(policy, teacher, kept, steps=3)
    for _ in policy.merged_weights():  # as an engine takes them
        pass
    assert sha256([p for p in policy.model.parameters() if not p.requires_grad]) == before
    with policy.without_adapter():
        assert torch.equal(states(policy), start)
    assert not torch.equal(states(policy), start)


@pytest.mark.parametrize("lora", [Lora(rank=4), None])
def test_frozen_teacher_never_moves(tiny_model: Path, lora: Lora | None) -> None:
    policy, teacher = loaded(tiny_model, lora), Frozen()
    kept = teacher.start(policy)
    names = list(policy.trainable())
    frozen = [p for name, p in policy.model.named_parameters() if name not in names]
    first, weights = sha256([taught(teacher, policy, kept)]), sha256(frozen)
    start = states(policy).detach()
    train(policy, teacher, kept, steps=10)
    assert (states(policy) - start).abs().max() > 0.1
    assert sha256([taught(teacher, policy, kept)]) == first
    assert sha256(frozen) == weights
    assert list(policy.trainable()) == names
    assert all(p.requires_grad for p in policy.trainable().values())
    assert teacher.state_dict(kept) == {}


def test_frozen_teacher_of_full_weights_is_the_folder_even_when_started_late(tiny_model: Path) -> None:
    policy, teacher = loaded(tiny_model, lora=None), Frozen()
    start = states(policy).detach()
    train(policy, Live(), {}, steps=2)
    kept = teacher.start(policy)
    torch.testing.assert_close(taught(teacher, policy, kept), start, atol=0, rtol=0)


def test_live_teacher_is_the_student(tiny_model: Path) -> None:
    policy, teacher = loaded(tiny_model), Live()
    kept = teacher.start(policy)
    train(policy, teacher, kept, steps=2)
    assert kept == {}
    assert torch.equal(taught(teacher, policy, kept), states(policy))


def test_ema_follows_by_its_formula_and_survives_a_checkpoint(tiny_model: Path) -> None:
    policy, teacher = loaded(tiny_model), EMA(decay=0.75)
    kept = teacher.start(policy)
    expected = {name: p.detach().clone() for name, p in policy.trainable().items()}
    for step in range(3):
        for p in policy.trainable().values():
            p.data += 0.1 * (step + 1)
        teacher.update(policy, kept)
        expected = {n: 0.75 * mean + 0.25 * policy.trainable()[n].detach() for n, mean in expected.items()}
    assert teacher.state_dict(kept).keys() == expected.keys()
    for name, mean in teacher.state_dict(kept).items():
        torch.testing.assert_close(mean, expected[name])
    resumed = teacher.start(policy)
    assert not torch.equal(taught(teacher, policy, resumed), taught(teacher, policy, kept))
    teacher.load_state_dict(resumed, teacher.state_dict(kept))
    assert torch.equal(taught(teacher, policy, resumed), taught(teacher, policy, kept))


def test_one_teacher_keeps_apart_what_it_keeps_for_two_students(tiny_model: Path) -> None:
    teacher, students = EMA(0.5), [loaded(tiny_model), loaded(tiny_model)]
    one, other = (teacher.start(student) for student in students)
    before, state = {name: mean.clone() for name, mean in other.items()}, teacher.state_dict(one)
    saved = {name: mean.clone() for name, mean in state.items()}
    train(students[0], teacher, one, steps=2)
    assert all(torch.equal(other[name], mean) for name, mean in before.items())
    assert all(torch.equal(state[name], mean) for name, mean in saved.items()), "a checkpoint stays as it was"
    assert any(not torch.equal(one[name], mean) for name, mean in teacher.start(students[0]).items())
    assert teacher == EMA(0.5)


@pytest.mark.parametrize("lora", [Lora(rank=4), None])
def test_the_trust_region_lies_between_start_and_student(tiny_model: Path, lora: Lora | None) -> None:
    policy, teacher = loaded(tiny_model, lora), TrustRegion(share=0.25)
    kept = teacher.start(policy)
    start = states(policy).detach()
    assert torch.equal(taught(teacher, policy, kept), start)
    train(policy, teacher, kept, steps=3)
    student, between = states(policy).detach(), taught(teacher, policy, kept)
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
    policy = loaded(tiny_model)
    kept = teacher.start(policy)
    train(policy, teacher, kept, steps=1)
    before = states(policy)
    with pytest.raises(RuntimeError, match="lost"), teacher.applied_to(policy, kept):
        raise RuntimeError("lost")
    assert torch.equal(states(policy), before)


def test_states_of_another_teacher_are_refused(tiny_model: Path) -> None:
    policy, teacher = loaded(tiny_model), EMA()
    kept = teacher.start(policy)
    with pytest.raises(ValueError, match=f"Frozen has no state, got {len(kept)} tensors of another teacher"):
        Frozen().load_state_dict({}, teacher.state_dict(kept))
    with pytest.raises(ValueError, match=f"expected the averages of {len(kept)} trainable weights, got 0 others"):
        teacher.load_state_dict(kept, {})
    with pytest.raises(ValueError, match="decay must be in"):
        EMA(decay=1.5)
