"""Loss and gradient of a step against full logits of transformers' own model, with autograd through all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ogls.algorithm import MicroBatch, gradient, weight_totals
from ogls.lessons.advantage import GroupRelative
from ogls.lessons.privilege import Demonstration, PeerOutcomes, Several, Unprivileged
from ogls.loss.divergence import ReverseKL
from ogls.loss.objective import Distillation, Likelihood, Mixture, Objective, ReferenceKL
from ogls.loss.policy_gradient import GRPO
from ogls.loss.steering import OutcomeSteering, Plain, PositiveMean
from ogls.methods import Method
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.teacher import Frozen, Live, OtherModel, Teacher
from ogls.records import Lesson, View

A, B = (5, 6, 7), (40, 41)
VIEWS = {
    prompt: (
        View(role="plain", prefix_ids=prompt),
        View(role="success", prefix_ids=(*prompt, 60, 61)),
        View(role="success", prefix_ids=(62, *prompt)),
        View(role="failure", prefix_ids=(*prompt, 70)),
    )
    for prompt in (A, B)
}


def lesson(prompt: tuple[int, ...], ids: tuple[int, ...], weights: tuple[float, ...], advantage: float) -> Lesson:
    views = VIEWS[prompt] if any(weights) else ()
    return Lesson(
        problem_id=str(ids),
        prompt_ids=prompt,
        token_ids=ids,
        token_weights=weights,
        logprobs=(-1.0,) * len(ids),
        views=views,
        advantage=advantage,
    )


LESSONS = (
    lesson(A, (11, 12, 13, 14), (1.0, 0.5, 0.0, 0.0), -1.5),  # distilled at its beginning, and reinforced
    lesson(A, (21, 22, 23), (0.0, 0.0, 0.0), 0.5),
    lesson(B, (31, 32), (0.0, 2.0), 0.0),  # distilled alone
    lesson(B, (11, 33, 34, 35, 36), (0.0, 0.0, 1.0, 0.0, 0.0), 2.0),
    lesson(A, (24,), (0.0,), -0.5),
)
WRITTEN = Lesson(problem_id="d", prompt_ids=B, token_ids=(81, 82, 83), token_weights=(1.0, 0.0, 1.0))


@dataclass
class Naive:
    """The same student as full logits [tokens, vocab], in transformers' own model with weights that have a gradient."""

    model: nn.Module
    leaves: dict[str, Tensor]
    scale: float | None

    def student(self, prefix: Sequence[int], ids: Sequence[int]) -> Tensor:
        return self._logits(self._weights(), prefix, ids)

    def start(self, prefix: Sequence[int], ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self._logits({}, prefix, ids)

    def present(self, prefix: Sequence[int], ids: Sequence[int]) -> Tensor:
        return self.student(prefix, ids).detach()

    def _weights(self) -> dict[str, Tensor]:
        if self.scale is None:
            return self.leaves
        base, made = dict(self.model.named_parameters()), {}
        for name, a in self.leaves.items():
            if ".lora_A." in name:
                own = name.replace(".lora_A.default", "")
                b = self.leaves[name.replace(".lora_A.", ".lora_B.")]
                made[own] = base[own].detach() + self.scale * (b @ a)
        return made

    def _logits(self, weights: dict[str, Tensor], prefix: Sequence[int], ids: Sequence[int]) -> Tensor:
        inputs = {"input_ids": torch.tensor([[*prefix, *ids]]), "use_cache": False}
        return torch.func.functional_call(self.model, weights, (), inputs).logits[0, len(prefix) - 1 : -1].double()


KINDS = {"full": {}, "embeddings, too": {"train_embeddings": True}, "lora": {"lora": Lora(rank=4, alpha=8)}}


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tiny_model: Path) -> tuple[Policy, Naive]:
    """A student that training has moved away from its start."""
    policy = Policy(str(tiny_model), dtype="float32", **({"lora": None} | KINDS[request.param])).load()
    generator = torch.Generator().manual_seed(0)
    for p in policy.trainable().values():
        p.data += 0.03 * torch.randn(p.shape, generator=generator)
    policy.version = 3
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in policy.trainable().items()}
    return policy, Naive(model=model, leaves=leaves, scale=8 / 4 if policy.lora else None)


def sampled(lessons: Sequence[Lesson], naive: Naive) -> list[Lesson]:
    """The lessons with log-probs of a sampler, such that ratios go from 0.6 to 1.6, and clips bind on both sides."""
    made = []
    for own in lessons:
        if own.logprobs is not None:
            logprobs = chosen(naive.present(own.prompt_ids, own.token_ids).log_softmax(-1), own.token_ids)
            spread = torch.linspace(-0.5, 0.5, len(own.token_ids)) * (-1) ** len(made)
            own = replace(own, logprobs=tuple((logprobs + spread).tolist()))
        made.append(own)
    return made


def chosen(values: Tensor, ids: Sequence[int]) -> Tensor:
    return values[range(len(ids)), list(ids)]


# ---- the terms by their formulas ----


def grpo(naive: Naive, lessons: Sequence[Lesson]) -> Tensor:
    """-mean over rollouts with an advantage of mean_t min(r A, clip(r, 0.8, 1.2) A)."""
    values = []
    for own in lessons:
        if own.advantage:
            logprob = chosen(naive.student(own.prompt_ids, own.token_ids).log_softmax(-1), own.token_ids)
            ratio = (logprob - torch.tensor(own.logprobs)).exp()
            assert ratio.min() < 0.8 or ratio.max() > 1.2 or len(own.token_ids) == 1
            values.append(-torch.minimum(ratio * own.advantage, ratio.clamp(0.8, 1.2) * own.advantage).mean())
    return torch.stack(values).mean()


def to_start(naive: Naive, lessons: Sequence[Lesson], per: str = "sequence") -> Tensor:
    """KL(student || start) of all tokens up to the last that counts, a mean over rollouts or over tokens."""
    values = []
    for own in lessons:
        ids = own.token_ids
        if not own.advantage:
            ids = ids[: max(t for t, weight in enumerate(own.token_weights) if weight) + 1]
        p, q = (logits(own.prompt_ids, ids).softmax(-1) for logits in (naive.student, naive.start))
        values.append((p * (p / q).log()).sum(-1))
    return torch.stack([v.mean() for v in values]).mean() if per == "sequence" else torch.cat(values).mean()


Reader = Callable[[Sequence[int], Sequence[int]], Tensor]


def steered(read: Reader, own: Lesson, alpha: float) -> Tensor:
    """plain + alpha (mean of success - mean of failure), as logits."""
    by_role = {role: mean_of(read, own, role) for role in ("plain", "success", "failure")}
    return by_role["plain"] + alpha * (by_role["success"] - by_role["failure"])


def mean_of(read: Reader, own: Lesson, role: str) -> Tensor:
    return torch.stack([read(v.prefix_ids, own.token_ids) for v in own.views if v.role == role]).mean(0)


def distilled(
    naive: Naive, lessons: Sequence[Lesson], target_of: Callable[[Lesson], Tensor], reverse: bool = False
) -> Tensor:
    """sum_t w_t KL(target || student) / sum_t w_t over lessons with views, or of KL(student || target)."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for own in lessons:
        if own.views:
            q, p = target_of(own).softmax(-1), naive.student(own.prompt_ids, own.token_ids).softmax(-1)
            each = (p * (p / q).log() if reverse else q * (q / p).log()).sum(-1)
            total = total + (torch.tensor(own.token_weights) * each).sum()
            count += sum(own.token_weights)
    return total / count


def likelihood(naive: Naive, lessons: Sequence[Lesson]) -> Tensor:
    """-sum_t w_t log student(token_t) / sum_t w_t over lessons without views."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for own in lessons:
        if not own.views:
            logprob = chosen(naive.student(own.prompt_ids, own.token_ids).log_softmax(-1), own.token_ids)
            total = total - (torch.tensor(own.token_weights) * logprob).sum()
            count += sum(own.token_weights)
    return total / count


def check(
    pair: tuple[Policy, Naive],
    method: Method,
    lessons: Sequence[Lesson],
    expected: Sequence[Tensor],
    budget: int,
) -> None:
    """Loss, gradient and the value of each term are those of `expected`, the terms by hand."""
    policy, naive = pair
    factors = [factor for factor, _ in method.objective.terms]
    total = torch.stack([factor * value for factor, value in zip(factors, expected, strict=True)]).sum()
    teachers: dict[str, Teacher] = {"teacher": method.teacher, "start": Frozen()}
    readers = {name: one.other(policy) for name, one in teachers.items()}
    lent = {
        name: partial(one.applied_to, (readers[name] or policy).load(), one.start(policy))
        for name, one in teachers.items()
    }
    seen: list[MicroBatch] = []
    loss = gradient(method, policy, lent, lessons, weight_totals(method, lessons), budget, seen.append)
    assert loss == pytest.approx(total.item(), rel=1e-5)
    assert len(seen) == {1: len(lessons), 100_000: 1}[budget]
    values = [sum(batch.results[i].value / batch.results[i].total for batch in seen) for i in range(len(factors))]
    assert values == pytest.approx([value.item() for value in expected], rel=1e-5, abs=2e-6)
    assert min(abs(value) for value in values) > 0.01
    grads = dict(zip(naive.leaves, torch.autograd.grad(total, list(naive.leaves.values())), strict=True))
    for name, p in policy.trainable().items():
        assert p.grad is not None
        assert (p.grad - grads[name]).norm() < 1e-4 * grads[name].norm(), name
        assert grads[name].any(), name


BUDGETS = pytest.mark.parametrize("budget", [1, 100_000])


@BUDGETS
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_the_kl_to_the_start_alone(pair: tuple[Policy, Naive], per: str, budget: int) -> None:
    lessons = sampled(LESSONS, pair[1])
    method = Method(privilege=Unprivileged(), objective=ReferenceKL(per=per))
    check(pair, method, lessons, [to_start(pair[1], lessons, per)], budget)


@BUDGETS
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_grpo_with_the_kl_of_its_paper(pair: tuple[Policy, Naive], per: str, budget: int) -> None:
    unread = [replace(own, views=(), token_weights=(0.0,) * len(own.token_ids)) for own in LESSONS if own.advantage]
    lessons = sampled(unread, pair[1])
    objective = Mixture([GRPO(), ReferenceKL(per=per)], [1.0, 0.04])
    method = Method(objective=objective, advantage=GroupRelative())
    check(pair, method, lessons, [grpo(pair[1], lessons), to_start(pair[1], lessons, per)], budget)


def two_steerings(*further: Objective) -> Objective:
    return Mixture([GRPO(), Distillation(), Distillation(ReverseKL(), steering=PositiveMean()), *further])


@BUDGETS
@pytest.mark.parametrize("teacher", [Frozen(), Live()], ids=["frozen", "live"])
def test_grpo_beside_two_distillations_with_steerings_of_their_own(
    pair: tuple[Policy, Naive], teacher: Teacher, budget: int
) -> None:
    naive, lessons = pair[1], sampled(LESSONS, pair[1])
    method = Method(
        privilege=PeerOutcomes(),
        teacher=teacher,
        steering=OutcomeSteering(1.4, ramp_steps=6),  # at version 3: half of it
        objective=Mixture([two_steerings()], [0.5]),
        advantage=GroupRelative(),
    )
    read = naive.present if teacher == Live() else naive.start
    expected = [
        grpo(naive, lessons),
        distilled(naive, lessons, lambda own: steered(read, own, alpha=0.7)),
        distilled(naive, lessons, lambda own: mean_of(read, own, "success"), reverse=True),
    ]
    check(pair, method, lessons, expected, budget)


@BUDGETS
def test_all_terms_at_once_with_a_live_teacher_and_a_written_text(pair: tuple[Policy, Naive], budget: int) -> None:
    """Two weights make targets here, and one lesson was not sampled: neither disturbs the other terms."""
    naive = pair[1]
    lessons = sampled([*LESSONS, WRITTEN], naive)
    method = Method(
        privilege=Several([PeerOutcomes(), Demonstration()]),
        teacher=Live(),
        steering=OutcomeSteering(0.7),
        objective=two_steerings(ReferenceKL(), Likelihood()),
        advantage=GroupRelative(),
    )
    expected = [
        grpo(naive, lessons),
        distilled(naive, lessons, lambda own: steered(naive.present, own, alpha=0.7)),
        distilled(naive, lessons, lambda own: mean_of(naive.present, own, "success"), reverse=True),
        to_start(naive, lessons),
        likelihood(naive, lessons),
    ]
    check(pair, method, lessons, expected, budget)


@BUDGETS
def test_another_model_teaches_with_a_head_of_its_own(
    pair: tuple[Policy, Naive], wide_model: Path, budget: int
) -> None:
    """Plain and privileged views, beside a term towards the start, whose head is the student's."""
    naive, lessons = pair[1], sampled(LESSONS, pair[1])
    model = AutoModelForCausalLM.from_pretrained(wide_model, dtype=torch.float32)

    def read(prefix: Sequence[int], ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prefix, *ids]])).logits[0, len(prefix) - 1 : -1]
        return logits[:, :320].double()

    method = Method(
        privilege=PeerOutcomes(),
        teacher=OtherModel(str(wide_model)),
        steering=OutcomeSteering(0.7),
        objective=Mixture([Distillation(ReverseKL(), steering=Plain()), Distillation(), ReferenceKL()]),
    )
    expected = [
        distilled(naive, lessons, lambda own: mean_of(read, own, "plain"), reverse=True),
        distilled(naive, lessons, lambda own: steered(read, own, alpha=0.7)),
        to_start(naive, lessons),
    ]
    check(pair, method, lessons, expected, budget)


@dataclass(frozen=True)
class Whole(Distillation):
    """Distils all tokens of a rollout with views, those after the last selected one too."""

    def num_scored(self, lesson: Lesson) -> int:
        return lesson.num_learned if lesson.views else 0

    def token_weights(self, lesson: Lesson) -> Sequence[float]:
        return (float(bool(lesson.views)),) * len(lesson.token_ids)


@BUDGETS
def test_terms_that_share_a_target_have_it_for_all_their_tokens(pair: tuple[Policy, Naive], budget: int) -> None:
    naive, lessons = pair[1], sampled(LESSONS, pair[1])
    method = Method(
        privilege=PeerOutcomes(),
        steering=OutcomeSteering(0.7),
        objective=Mixture([Distillation(), Whole()]),
    )
    assert len(method.targets) == 1
    whole = [replace(own, token_weights=(1.0,) * len(own.token_ids)) for own in lessons]
    expected = [distilled(naive, of, lambda own: steered(naive.start, own, alpha=0.7)) for of in (lessons, whole)]
    check(pair, method, lessons, expected, budget)


def test_a_step_without_lessons_has_no_loss_and_no_gradient(pair: tuple[Policy, Naive]) -> None:
    policy, method = pair[0], Method(objective=ReferenceKL())
    assert weight_totals(method, []) == [0.0]
    assert gradient(method, policy, {}, [], [0.0], 100, lambda _: None) == 0.0
    assert all(p.grad is None for p in policy.trainable().values())
