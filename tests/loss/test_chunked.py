"""The chunked loss against naive autograd over all logits, by closed forms, and at the edges of the number formats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ogls.loss import tiles as blocking
from ogls.loss.chunked import chunked_divergence, chunked_logprobs
from ogls.loss.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL, SkewKL
from ogls.loss.topk import TopK

T, V, H = 23, 13, 5
ALL = [ForwardKL(), ReverseKL(), JensenShannon(0.3), SkewKL(0.1)]


def setup(seed: int = 0, gap: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student states that require a gradient, target states, weight, bias."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(T, H, generator=generator, dtype=dtype)
    target = student + gap * torch.randn(T, H, generator=generator, dtype=dtype)
    weight, bias = torch.randn(V, H, generator=generator, dtype=dtype), torch.randn(V, generator=generator, dtype=dtype)
    return student.requires_grad_(), target, weight, bias


def naive(
    student: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    divergence: Divergence,
    temperature: float = 1.0,
    clip: float | None = None,
    one_sided: bool = False,
) -> Tensor:
    """D [tokens] with all logits in memory and the gradient by autograd."""
    p, q = (torch.nn.functional.linear(h, weight, bias).div(temperature).softmax(-1) for h in (student, target))
    return full(p, q, divergence, clip, one_sided)


def full(p: Tensor, q: Tensor, divergence: Divergence, clip: float | None = None, one_sided: bool = False) -> Tensor:
    """D [tokens] of two tables of probabilities, the student's and the target's."""
    match divergence:
        case ForwardKL():
            summand = q * (q / p).log()
        case ReverseKL():
            summand = p * (p / q).log()
        case JensenShannon(beta):
            m = (1 - beta) * p + beta * q
            summand = beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()
        case SkewKL(skew):
            summand = q * (q / ((1 - skew) * p + skew * q)).log()
    if clip is not None:
        summand = summand.clamp(max=clip) if one_sided else summand.clamp(-clip, clip)
    return summand.sum(-1)


def value_and_gradient(values: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Values and the gradient of a sum in which every token has another weight."""
    weights = torch.linspace(0.5, 2.0, len(values), dtype=values.dtype)
    (gradient,) = torch.autograd.grad((weights * values).sum(), hidden)
    return values.detach(), gradient


def assert_same(ours: Tensor, reference: Tensor, hidden: Tensor, tolerance: float = 1e-10) -> None:
    for a, b in zip(value_and_gradient(ours, hidden), value_and_gradient(reference, hidden), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clip", [None, (0.02, False), (0.02, True)], ids=["", "clip", "one-sided"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("chunk", [1, 2, 7, V, T])
def test_fused_is_naive(
    chunk: int, divergence: Divergence, temperature: float, clip: tuple[float, bool] | None
) -> None:
    student, target, weight, bias = setup()
    bound, one_sided = clip or (None, False)
    settings = {"temperature": temperature, "clip": bound, "one_sided": one_sided}
    ours, _ = chunked_divergence(student, target, weight, bias, divergence, chunk_rows=chunk, **settings)
    assert_same(ours, naive(student, target, weight, bias, divergence, **settings), student)


@pytest.mark.parametrize("support", [None, TopK(4), TopK(3, of="union")], ids=["all", "top 4", "union"])
@pytest.mark.parametrize("divergence", ALL)
def test_a_target_with_a_head_of_its_own_is_naive(divergence: Divergence, support: TopK | None) -> None:
    """Logits of two widths; the same two as states of one head that reads both side by side."""
    student, _, weight, bias = setup()
    generator = torch.Generator().manual_seed(5)
    wide, own = (torch.randn(n, H + 3, generator=generator).double() for n in (T, V))
    head, ids = (own, bias.flip(0)), torch.arange(T) % V
    settings = {"support": support, "temperature": 1.3, "token_ids": ids, "chunk_rows": 7}
    ours, logprobs = chunked_divergence(student, wide, weight, bias, divergence, head_target=head, **settings)
    logits = torch.eye(V).double()  # a head that gives its states, which are logits already
    z, target = torch.nn.functional.linear(student, weight, bias), torch.nn.functional.linear(wide, *head)
    if support is None:
        reference = naive(z, target, logits, None, divergence, temperature=1.3)
    else:
        reference, _ = chunked_divergence(z, target, logits, None, divergence, support=support, temperature=1.3)
        (by_logits,) = torch.autograd.grad(reference.sum(), z, retain_graph=True)
        (chained,) = torch.autograd.grad(ours.sum(), student, retain_graph=True)
        torch.testing.assert_close(chained, by_logits @ weight)
        reference = reference.detach() + (by_logits.detach() * (z - z.detach())).sum(-1)
    assert_same(ours, reference, student)
    assert logprobs is not None
    torch.testing.assert_close(logprobs, (z.detach() / 1.3).log_softmax(-1)[range(T), ids])


def test_the_same_head_twice_is_one_head() -> None:
    student, target, weight, bias = setup()
    one, _ = chunked_divergence(student, target, weight, bias, ReverseKL())
    two, _ = chunked_divergence(student, target, weight, bias, ReverseKL(), head_target=(weight, bias))
    assert_same(two, one, student)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_blocks_and_threads_change_nothing(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, target, weight, bias = setup()
    whole, _ = chunked_divergence(student, target, weight, bias, ForwardKL())
    monkeypatch.setitem(blocking.CHUNK_BYTES, "cpu", 8 * 2 * V * 8)
    monkeypatch.setitem(blocking.TILE_BYTES, "cpu", 3 * V * 8)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        blocked, _ = chunked_divergence(student, target, weight, bias, ForwardKL())
        assert_same(blocked, whole, student, 1e-12)
        with torch.inference_mode():
            unattached, _ = chunked_divergence(student.detach().clone(), target, weight, bias, ForwardKL())
        assert torch.equal(unattached, blocked.detach())
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("divergence", ALL)
def test_gradcheck(divergence: Divergence) -> None:
    student, target, weight, bias = setup()
    torch.autograd.gradcheck(
        lambda h: chunked_divergence(h, target[:4], weight, bias, divergence, temperature=1.3)[0],
        (student.detach()[:4].requires_grad_(),),
    )


def test_closed_form_of_the_forward_kl() -> None:
    """dKL(target || student) / dz = softmax(z) - p_target."""
    student, target, weight, bias = setup()
    divergence, _ = chunked_divergence(student, target, weight, bias, ForwardKL())
    (gradient,) = torch.autograd.grad(divergence.sum(), student)
    p, q = (torch.softmax(h @ weight.T + bias, -1) for h in (student.detach(), target))
    torch.testing.assert_close(gradient, (p - q) @ weight, rtol=1e-10, atol=1e-12)


def test_three_tokens_by_hand() -> None:
    """Head = identity, student logits (ln 2, 0, 0), target (0, 0, ln 2): KL = ln2/2 - ln2/4, dz = (1/4, 0, -1/4)."""
    ln2 = math.log(2)
    student = torch.tensor([[ln2, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.0, 0.0, ln2]], dtype=torch.float64)
    ids = torch.tensor([0])
    divergence, logprob = chunked_divergence(student, target, torch.eye(3).double(), None, ForwardKL(), token_ids=ids)
    divergence.sum().backward()
    assert divergence.item() == pytest.approx(ln2 / 4)
    assert logprob is not None
    assert logprob.item() == pytest.approx(-ln2)
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([0.25, 0, -0.25])


@pytest.mark.parametrize("divergence", ALL)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), shift=st.floats(-50, 50))
def test_shift_permutation_and_company_change_nothing(divergence: Divergence, seed: int, shift: float) -> None:
    student, target, weight, bias = setup(seed)
    reference = value_and_gradient(chunked_divergence(student, target, weight, bias, divergence)[0], student)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
    changed = {
        "shift": chunked_divergence(student, target, weight, bias + shift, divergence)[0],
        "permutation": chunked_divergence(student, target, weight[order], bias[order], divergence)[0],
        "one by one": torch.cat(
            [chunked_divergence(student[t, None], target[t, None], weight, bias, divergence)[0] for t in range(T)]
        ),
    }
    for values in changed.values():
        for a, b in zip(value_and_gradient(values, student), reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ALL)
def test_student_as_its_own_teacher_has_no_loss(divergence: Divergence, dtype: torch.dtype) -> None:
    student, _, weight, bias = setup(dtype=dtype)
    values, _ = chunked_divergence(student, student.detach().to(torch.float32), weight, bias, divergence)
    if dtype == torch.float64:
        values, _ = chunked_divergence(student, student.detach(), weight, bias, divergence)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert not values.any()
    assert not gradient.any()  # to the last bit: Adam would make full steps of rounding


def test_one_token_moves_alone() -> None:
    student, target, weight, bias = setup()
    before = value_and_gradient(chunked_divergence(student, target, weight, bias, JensenShannon())[0], student)
    moved = student.detach().clone()
    moved[9] += 0.5
    moved.requires_grad_()
    after = value_and_gradient(chunked_divergence(moved, target, weight, bias, JensenShannon())[0], moved)
    others = torch.arange(T) != 9
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[others], b[others])
        assert not torch.equal(a[9], b[9])


def test_exact_kl_agrees_with_a_sampled_one() -> None:
    student, target, weight, bias = setup()
    exact, _ = chunked_divergence(student, target, weight, bias, ForwardKL())
    p, q = (torch.log_softmax(h @ weight.T + bias, -1)[0] for h in (student.detach(), target))
    ids = torch.multinomial(q.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    samples = (q - p)[ids]
    assert abs(samples.mean() - exact[0].detach()) < 4 * samples.std() / math.sqrt(len(samples))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", ALL)
def test_extreme_states_stay_finite(divergence: Divergence, dtype: torch.dtype) -> None:
    """Logits thousands apart: u > 80, probabilities that underflow on either side."""
    student, target, weight, bias = setup(gap=3000.0, dtype=dtype)
    for clip in (None, 0.05):
        values, logprob = chunked_divergence(
            student, target, weight, bias, divergence, clip=clip, token_ids=torch.zeros(T, dtype=torch.long)
        )
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert logprob is not None
        assert values.isfinite().all()
        assert logprob.isfinite().all()
        assert gradient.isfinite().all()
        assert values.min() >= (-1e-12 if dtype == torch.float64 else -1e-4) or clip is not None


def test_difference_form_keeps_small_gradients_in_bfloat16() -> None:
    """Of a divergence of about 1e-3 nat, rounding each side's logits to bf16 by itself leaves a far worse gradient."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(64, 128, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(4000, 128, generator=generator) * 0.25).bfloat16()
    target = student.detach().float() + 0.016 * torch.randn(64, 128, generator=generator)
    exact_student = student.detach().double().requires_grad_()
    exact = naive(exact_student, target.double(), weight.double(), None, ForwardKL())
    assert 2e-4 < exact.mean() < 5e-3
    (truth,) = torch.autograd.grad(exact.sum(), exact_student)

    def error(values: Tensor) -> float:
        (gradient,) = torch.autograd.grad(values.sum(), student)
        return ((gradient.double() - truth).norm() / truth.norm()).item()

    ours, _ = chunked_divergence(student, target, weight, None, ForwardKL())
    torch.testing.assert_close(ours.double(), exact, rtol=0.05, atol=2e-5)
    z_student, z_target = student @ weight.T, target.bfloat16() @ weight.T
    p, q = z_student.float().log_softmax(-1), z_target.float().log_softmax(-1)
    joint, separate = error(ours), error((q.exp() * (q - p)).sum(-1))
    assert joint < 0.03
    assert joint < separate / 5


def test_large_logits_are_rounded_where_the_mass_is() -> None:
    """Logits far from 0, as a trained model's: bf16 leaves a far better gradient when a likely token is known."""
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(32, 64, generator=generator) + 1.0).bfloat16().requires_grad_()
    weight = (torch.randn(1000, 64, generator=generator) * 0.3 + 0.6).bfloat16()
    target = student.detach().float() + 0.1 * torch.randn(32, 64, generator=generator)
    logits = student.detach() @ weight.T
    assert logits.amax(-1).min() > 30
    exact_student = student.detach().double().requires_grad_()
    exact = naive(exact_student, target.double(), weight.double(), None, ReverseKL())
    (truth,) = torch.autograd.grad(exact.sum(), exact_student)

    def error(ids: Tensor | None) -> float:
        values, _ = chunked_divergence(student, target, weight, None, ReverseKL(), token_ids=ids)
        (gradient,) = torch.autograd.grad(values.sum(), student)
        return ((gradient.double() - truth).norm() / truth.norm()).item()

    likely = error(logits.argmax(-1))
    assert likely < 0.01
    assert likely < error(None) / 3


def test_logprobs_of_large_logits_are_not_rounded_to_their_spacing() -> None:
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(32, 64, generator=generator) + 1.0).bfloat16()
    weight = (torch.randn(1000, 64, generator=generator) * 0.3 + 0.6).bfloat16()
    exact = (states.double() @ weight.double().T).log_softmax(-1)
    likely = exact.argmax(-1)
    rounded = (states @ weight.T).float().log_softmax(-1)
    ours, theirs = (
        (found.double() - exact.gather(-1, likely[:, None])[:, 0]).abs().mean()
        for found in (chunked_logprobs(states, weight, None, likely), rounded.gather(-1, likely[:, None])[:, 0])
    )
    assert ours < theirs / 5


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("chunk", [1, 2, 7, V, T])
def test_logprobs_are_naive(chunk: int, temperature: float) -> None:
    student, target, weight, bias = setup()
    ids = torch.arange(T) % V
    ours = chunked_logprobs(student, weight, bias, ids, temperature=temperature, chunk_rows=chunk)
    z = torch.nn.functional.linear(student, weight, bias) / temperature
    assert_same(ours, z.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1), student)
    beside, logprob = chunked_divergence(
        student, target, weight, bias, ForwardKL(), temperature=temperature, token_ids=ids, chunk_rows=chunk
    )
    assert beside.requires_grad
    assert logprob is not None
    assert not logprob.requires_grad
    torch.testing.assert_close(logprob, ours.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("divergence", ALL)
def test_a_trained_head_has_the_gradient_of_autograd(
    divergence: Divergence, temperature: float, chunk: int | None
) -> None:
    """The target's logits are fixed: they are made by the same head, and get no gradient."""
    student, target, weight, bias = setup()
    target[::5] = student[::5].detach()  # tokens that have nothing to learn
    trained = student, weight.requires_grad_(), bias.requires_grad_()
    values, _ = chunked_divergence(student, target, weight, bias, divergence, temperature=temperature, chunk_rows=chunk)
    p = torch.nn.functional.linear(student, weight, bias).div(temperature).softmax(-1)
    q = torch.nn.functional.linear(target, weight, bias).div(temperature).softmax(-1).detach()
    wanted = full(p, q, divergence)
    weights = torch.linspace(0.5, 2.0, T, dtype=values.dtype)
    torch.testing.assert_close(values, wanted)
    ours, theirs = (torch.autograd.grad((weights * v).sum(), trained) for v in (values, wanted))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_logprobs_of_a_trained_head_have_the_gradient_of_autograd() -> None:
    student, _, weight, bias = setup()
    ids, trained = torch.arange(T) % V, (student, weight.requires_grad_(), bias.requires_grad_())
    values = chunked_logprobs(student, weight, bias, ids, temperature=0.7, chunk_rows=4)
    logits = torch.nn.functional.linear(student, weight, bias) / 0.7
    wanted = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    # A ratio is not linear in a log-probability, as in a policy gradient.
    ours, theirs = (torch.autograd.grad((v * v.detach().exp() + v.square()).sum(), trained) for v in (values, wanted))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


def test_logprobs_gradcheck() -> None:
    student, _, weight, bias = setup()
    hidden, ids = student.detach()[:4].requires_grad_(), torch.tensor([0, 3, 3, 12])
    torch.autograd.gradcheck(lambda h: chunked_logprobs(h, weight, bias, ids, temperature=0.7), (hidden,))


def test_no_tokens() -> None:
    student, target, weight, bias = setup()
    ids = torch.zeros(0, dtype=torch.long)
    values, logprob = chunked_divergence(student[:0], target[:0], weight, bias, ForwardKL(), token_ids=ids)
    for loss in (values.sum(), chunked_logprobs(student[:0], weight, bias, ids).sum()):
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.equal(gradient, torch.zeros_like(student))
    assert logprob is not None
    assert len(logprob) == 0


def test_without_gradient_the_values_are_the_same() -> None:
    student, target, weight, bias = setup()
    values, _ = chunked_divergence(student, target, weight, bias, ReverseKL())
    with torch.no_grad():
        plain, _ = chunked_divergence(student, target, weight, bias, ReverseKL())
    assert not plain.requires_grad
    assert torch.equal(plain, values)


def test_mixed_precision_keeps_the_states_dtype() -> None:
    """Adapter in fp32, head in bf16: GEMMs in the head's dtype, gradient in the states'."""
    student, target, weight, bias = setup(dtype=torch.float32)
    values, _ = chunked_divergence(student, target, weight.bfloat16(), bias.bfloat16(), ForwardKL())
    values.sum().backward()
    assert values.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == torch.float32
    reference = naive(student, target, weight.bfloat16().float(), bias.bfloat16().float(), ForwardKL())
    torch.testing.assert_close(values, reference, rtol=0.05, atol=0.03)


def test_bad_states_are_named() -> None:
    student, target, weight, bias = setup()
    with pytest.raises(ValueError, match=r"got \[23, 5\] and \[13, 4\]"):
        chunked_divergence(student, target, weight[:, :4], bias, ForwardKL())
    with pytest.raises(ValueError, match=r"target states \[23, 5\], got \[22, 5\]"):
        chunked_divergence(student, target[:22], weight, bias, ForwardKL())
    with pytest.raises(ValueError, match="states and a head of 13 rows for the target, got 12"):
        chunked_divergence(student, target, weight, bias, ForwardKL(), head_target=(weight[:12], None))
    with pytest.raises(ValueError, match="a target state for each of 23, got 22"):
        chunked_divergence(student, target[:22], weight, bias, ForwardKL(), head_target=(weight, None))
    with pytest.raises(ValueError, match=r"one token id per state, 23, got \[22\]"):
        chunked_logprobs(student, weight, bias, torch.zeros(22, dtype=torch.long))
