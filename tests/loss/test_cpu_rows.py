"""The row passes in C++ against autograd in fp64, against the torch operations, and where they cannot be had."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ogls.loss import chunked, cpu_rows
from ogls.loss.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL, SkewKL
from ogls.loss.tiles import for_each_tile

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
ALL = [ForwardKL(), ReverseKL(), JensenShannon(0.3), SkewKL(0.1), SkewKL(0.0)]
CLIPS = [(None, False), (0.002, False), (0.002, True)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    cpu_rows.library.cache_clear()


def options(divergence: Divergence, **further: Any) -> dict[str, Any]:
    usual = {"temperature": 1.0, "clip": None, "one_sided": False, "wants_gradient": True}
    return {"divergence": divergence} | usual | further


def logits_and_gaps(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    logits, gaps = torch.randn(2, rows, vocab, generator=generator)
    return (3 * logits).to(dtype), gaps.to(dtype)


def made(passes: Any, logits: Tensor, gaps: Tensor, **further: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients and log-probabilities; the arguments stay as they are."""
    logits, values, logprobs = logits.clone(), *logits.new_empty(2, len(logits), dtype=torch.float32)
    ids = torch.arange(len(logits)) % logits.shape[1]
    passes(logits, gaps.clone(), values, ids, logprobs, **further)
    return values, logits, logprobs


def truth(
    logits: Tensor, gaps: Tensor, divergence: Divergence, temperature: float, clip: float | None, one_sided: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in fp64, the gradient by autograd through the definition."""
    z = (logits.double() / temperature).requires_grad_()
    log_p = z.log_softmax(-1)
    log_q = (z.detach() + gaps.double() / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    match divergence:
        case ForwardKL():
            summand = q * (log_q - log_p)
        case ReverseKL():
            summand = p * (log_p - log_q)
        case JensenShannon(beta):
            m = ((1 - beta) * p + beta * q).log()
            summand = beta * q * (log_q - m) + (1 - beta) * p * (log_p - m)
        case SkewKL(skew):
            summand = q * (log_q - ((1 - skew) * p + skew * q).log())
    if clip is not None:
        summand = summand.clamp(max=clip) if one_sided else summand.clamp(-clip, clip)
    values = summand.sum(-1)
    values.sum().backward()
    assert z.grad is not None
    ids = torch.arange(len(logits)) % logits.shape[1]
    return values.detach(), z.grad, log_p.detach().gather(-1, ids[:, None]).squeeze(-1)


@pytest.mark.parametrize("vocab", [1, 7, 16, 4096, 9001])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_is_the_definition(divergence: Divergence, clip: tuple[float | None, bool], vocab: int) -> None:
    for dtype, rounding in ((torch.float32, 0.0), (torch.bfloat16, 2.0**-8)):
        for temperature in (1.0, 1.7):
            z, u = logits_and_gaps(3, vocab, dtype)
            same = {"temperature": temperature, "clip": clip[0], "one_sided": clip[1]}
            values, gradient, logprobs = made(cpu_rows.divergence_rows, z, u, **options(divergence, **same))
            value, exact, logprob = truth(z, u, divergence, **same)
            torch.testing.assert_close(values.double(), value, rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(logprobs.double(), logprob, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(gradient.double(), exact, rtol=1e-5 + rounding, atol=3e-7)


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_is_as_near_to_the_truth_as_torch_operations(divergence: Divergence) -> None:
    z, u = logits_and_gaps(16, 49_152)
    same = options(divergence)
    values, gradients, _ = truth(z, u, divergence, 1.0, None, False)
    ours, torchs = (made(passes, z, u, **same) for passes in (cpu_rows.divergence_rows, chunked.divergence_rows))
    assert (ours[0] - values).abs().max() <= 2 * (torchs[0] - values).abs().max() + 1e-7
    assert (ours[1] - gradients).norm() <= 2 * (torchs[1] - gradients).norm()


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_equal_rows_have_the_divergence_0(divergence: Divergence) -> None:
    z, u = logits_and_gaps(2, 1000)
    values, _, _ = made(cpu_rows.divergence_rows, z, 0 * u, **options(divergence))
    assert values.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_extreme_rows_are_those_of_torch_operations(divergence: Divergence) -> None:
    """Logits as far apart as they get, infinite, missing; a row between them, and one with masked tokens, are not."""
    z, u = logits_and_gaps(12, 1000)
    z[0] *= 1000
    u[1, 5] = 500.0
    z[2], z[2, 3] = -200.0, 200.0
    u[2, 4] = 399.0
    u[3, 999] = torch.nan
    z[4, 0] = torch.inf
    z[5, 6] = torch.nan
    z[6] = -torch.inf
    u[7, 8] = -torch.inf
    z[8, 20:] = -torch.inf
    u[9, 999] = torch.inf
    u[10] *= 20
    same = options(divergence)
    expected, found = (made(passes, z, u, **same) for passes in (chunked.divergence_rows, chunked.quick_rows))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=2e-5, equal_nan=True
        )  # gaps of 500 are rounded to 3e-5
    alone = made(cpu_rows.divergence_rows, z, u, **same)
    left = alone[0].isnan()
    assert left.nonzero().squeeze(-1).tolist() == [3, 4, 5, 6, 7, 9]
    assert torch.equal(alone[1][left].nan_to_num(), z[left].nan_to_num())


def test_a_token_beyond_the_vocabulary_is_an_error() -> None:
    z, u = logits_and_gaps(2, 9)
    for token in (9, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            chunked.quick_rows(z, u, z.new_empty(2), torch.tensor([0, token]), z.new_empty(2), **options(ForwardKL()))


def test_without_a_gradient_the_logits_stay() -> None:
    z, u = logits_and_gaps(2, 9)
    values, after, _ = made(cpu_rows.divergence_rows, z, u, **options(ForwardKL(), wants_gradient=False))
    assert torch.equal(after, z)
    assert torch.equal(values, made(cpu_rows.divergence_rows, z, u, **options(ForwardKL()))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_chunks_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    z, u = logits_and_gaps(11, 1003, dtype)
    whole = made(cpu_rows.divergence_rows, z, u, **options(JensenShannon()))
    passes = partial(chunked.quick_rows, **options(JensenShannon()))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (1, 2, 4, 11):
                tiled = made(partial(for_each_tile, passes, tile_bytes=4 * 1003 * rows), z, u)
                assert all(torch.equal(a, b) for a, b in zip(tiled, whole, strict=True))
    finally:
        torch.set_num_threads(before)


def test_who_gets_it() -> None:
    class Own(ForwardKL):
        """Something of one's own, that only its `terms` know."""

    for divergence in ALL:
        for dtype in (torch.float32, torch.bfloat16):
            assert cpu_rows.knows(divergence, CPU, dtype)
            chosen = chunked.passes(divergence, None, CPU, dtype)
            assert chosen.args[0].func is chunked.quick_rows
    assert not cpu_rows.knows(Own(), CPU, torch.float32)
    assert not cpu_rows.knows(ForwardKL(), torch.device("cuda"), torch.bfloat16)
    for dtype in (torch.float16, torch.float64):
        assert not cpu_rows.knows(ForwardKL(), CPU, dtype)
        assert chunked.passes(ForwardKL(), None, CPU, dtype).args[0].func is chunked.divergence_rows


def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OGLS_CACHE", str(tmp_path))
    cpu_rows.library.cache_clear()
    assert cpu_rows.library() is not None
    (built,) = tmp_path.iterdir()
    cpu_rows.library.cache_clear()  # as another process has it
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    assert cpu_rows.library() is not None
    assert list(tmp_path.iterdir()) == [built]


@pytest.mark.parametrize("case", ["no compiler", "a compiler that fails", "no folder"])
def test_without_it_the_loss_is_that_of_torch_operations(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("OGLS_CACHE", str(folder))
    if case == "no folder":
        folder.write_text("a file")
    else:
        monkeypatch.setenv("CXX", "no-such-compiler" if case == "no compiler" else "false")
    cpu_rows.library.cache_clear()
    states, target, weight = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="could not be built .* install a C\\+\\+ compiler"):
        values, _ = chunked.chunked_divergence(states, target, weight, None, ForwardKL())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = chunked.chunked_divergence(states, target, weight, None, ForwardKL())
    exact, _ = chunked.chunked_divergence(states.double(), target.double(), weight.double(), None, ForwardKL())
    assert torch.equal(values, again)
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-6)
    assert not folder.is_dir() or not list(folder.iterdir())
