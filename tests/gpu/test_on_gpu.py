"""What a GPU computes, against the same on a CPU: kernels, attention, passes, the loss, and whole runs.

They are run by `make gpu` alone, without the other tests' run-time type checks, which Triton would take for code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from interpreted_layers import ARCHITECTURES, states_and_gradients
from interpreted_rows import BUDGETS, CASES, QWEN3, TOP, Case, alphas
from random_models import write_model
from torch import Tensor

from ogls.loss import chunked
from ogls.loss.alpha_bound import HALVINGS, bisect_tile
from ogls.loss.chunked import chunked_divergence
from ogls.loss.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL, SkewKL
from ogls.loss.topk import TopK, topk_rows
from ogls.policy.attention import packed_attention
from ogls.policy.layout import varlen
from ogls.policy.lora import Lora
from ogls.policy.packing import pack
from ogls.policy.policy import Policy
from tests.loss.test_chunked import naive
from tests.policy.test_attention import drawn, lengths

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ROOT = Path(__file__).resolve().parents[2]


def apart(got: Tensor, expected: Tensor) -> float:
    """The relative distance |got - expected| / |expected|."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", [*CASES, *TOP, *QWEN3], ids=str)
def test_row_kernels(case: Case) -> None:
    from ogls.loss import triton_rows, triton_topk

    rounding = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6}[case.dtype]
    *of_tokens, logits = case.run(chunked.divergence_rows if case.support is None else topk_rows)
    *by_kernel, gradient = case.run(
        triton_rows.divergence_rows if case.support is None else triton_topk.topk_rows, device="cuda"
    )
    for ours, theirs in zip(by_kernel, of_tokens, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
    if case.further:
        step = 2.0**-7 if case.dtype == torch.bfloat16 else rounding
        torch.testing.assert_close(gradient, logits, rtol=step, atol=rounding)


@pytest.mark.parametrize("epsilon", BUDGETS)
def test_alpha_kernel(epsilon: float) -> None:
    from ogls.loss.triton_alpha import bisect_rows

    found = alphas(partial(bisect_rows, halvings=HALVINGS), epsilon, "cuda")
    torch.testing.assert_close(found, alphas(bisect_tile, epsilon), rtol=0.0, atol=4.0 / 2**HALVINGS)


def rotating_as_a_cpu(policy: Policy) -> Policy:
    """Moves cosines and sines to a CPU: transformers finds them in fp32, where a GPU's differ in their last bit."""
    rotary = next(module for module in policy.modules() if type(module).__name__.endswith("RotaryEmbedding")).cpu()
    found = rotary.forward

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(angles.to(x.device) for angles in found(x.cpu(), position_ids.cpu()))

    rotary.forward = forward
    return policy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layer_kernels(architecture: str, tmp_path: Path) -> None:
    """In fp64, against transformers' own layers on a CPU; both rotate by the angles that a CPU finds."""
    model = write_model(tmp_path / "model", architecture, attention_bias=False)
    policy = Policy(str(model), lora=Lora(rank=4), dtype="float32").load().double()
    for p in policy.trainable().values():
        p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    expected, none = states_and_gradients(policy)
    got, calls = states_and_gradients(rotating_as_a_cpu(policy.to("cuda")))
    assert (len(none), calls["swiglu"], calls["rotated"] > 0) == (0, 2, True)
    assert max(map(apart, got, expected)) < 1e-10


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("heads", [(4, 2, 64), (16, 8, 128)], ids=str)
def test_attention_is_one_call(heads: tuple[int, int, int], seed: int) -> None:
    """Output and gradients of flash attention in bf16, against grids in fp64."""
    *sequences, share = drawn(seed)
    row = pack(*sequences, share_prefixes=share, device=torch.device("cpu"), dtype=torch.float64)
    roots, branches, owners = lengths(row)
    tokens, (queries, keys, size) = sum(roots) + sum(branches), heads
    generator = torch.Generator().manual_seed(seed)
    drawn_inputs = [torch.randn(1, h, tokens, size, generator=generator).bfloat16() for h in (queries, keys, keys)]
    weight = torch.randn(tokens, queries, size, generator=generator).bfloat16()
    found = []
    for device, dtype, how in (
        ("cpu", torch.float64, row.layout),
        ("cuda", torch.bfloat16, varlen(roots, branches, owners, torch.device("cuda"))),
    ):
        xs = [x.to(device, dtype).requires_grad_() for x in drawn_inputs]
        out, _ = packed_attention(torch.nn.Identity(), *xs, None, packing=replace(row, layout=how))
        found.append((out[0], *torch.autograd.grad((out[0] * weight.to(device, dtype)).sum(), xs)))
    assert max(map(apart, found[1], found[0])) < 1e-2


@pytest.mark.parametrize("lora", [Lora(rank=4), None], ids=["adapter", "all weights"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_policy_in_bf16(lora: Lora | None, checkpointing: bool, tmp_path: Path) -> None:
    """States and gradients beside those in fp32 on a CPU; the model is small, and its weights large."""
    model = write_model(tmp_path / "model", "qwen3", head_dim=64)
    found = []
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        policy = Policy(str(model), lora=lora, dtype=dtype, gradient_checkpointing=checkpointing).load().to(device)
        for p in policy.trainable().values():
            if lora is not None:
                p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        found.append(states_and_gradients(policy)[0])
    expected, got = found
    assert apart(got[0], expected[0]) < 2e-2
    assert apart(torch.cat([x.flatten() for x in got[1:]]), torch.cat([x.flatten() for x in expected[1:]])) < 5e-2


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(), SkewKL(0.1)], ids=str)
@pytest.mark.parametrize("support", [None, TopK(50)], ids=["all", "top 50"])
def test_loss_of_a_real_vocabulary(divergence: Divergence, support: TopK | None) -> None:
    """With a head in bf16, against autograd in fp64 with the same numbers; 50 tokens are far likelier than others."""
    vocab, width, tokens = 151_936, 256, 24
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, width, generator=generator)
    weight[:, 0] = 0.0
    weight[:50, 0] = 6.0
    student = 0.03 * torch.randn(tokens, width, generator=generator)
    student[:, 0] = 1.0
    target = student + 0.01 * torch.randn(tokens, width, generator=generator)
    student, target, weight = student.bfloat16(), target.float(), weight.bfloat16()

    def found(device: str, dtype: torch.dtype, by: Callable[..., Tensor]) -> list[Tensor]:
        x = student.to(device, dtype).requires_grad_()
        values = by(x, target.to(device, torch.promote_types(dtype, torch.float32)), weight.to(device, dtype))
        return [values, *torch.autograd.grad(values.sum(), x)]

    def ours(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return chunked_divergence(x, y, w, None, divergence, support=support)[0]

    def plain(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return naive(x, y, w, None, divergence) if support is None else ours(x, y, w)

    expected = found("cpu", torch.float64, plain)
    got = found("cuda", torch.bfloat16, ours)
    assert apart(got[0], expected[0]) < 2e-2
    assert apart(got[1], expected[1]) < 2e-2


def fit(folder: Path, *options: str, device: str = "gpu") -> tuple[list[dict[str, float]], str]:
    """The rows of a run of the lab, and what it printed to stderr."""
    logger = {"folder": folder.parent, "run_name": folder.name, "tracking_uri": f"sqlite:///{folder}.db"}
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), "fit", "--config", "lab.yaml", *options]
    command += [str(word) for key, value in logger.items() for word in (f"--trainer.logger.init_args.{key}", value)]
    command += ["--trainer.accelerator", device]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], done.stderr


def learned(rows: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    """Losses by step, and held-out accuracy by validation."""
    losses, accuracies = ([row[key] for row in rows if key in row] for key in ("train/loss", "val/avg_at_8"))
    return losses, accuracies


SHORT = ("--data.steps_per_epoch", "2", "--data.val.size", "16", "--data.problems_per_step", "8")
LORA = ("--policy.lora", "{rank: 8}", "--policy.dtype", "bfloat16")


@pytest.mark.parametrize("how", [(), LORA], ids=["all weights, fp32", "adapter, bf16"])
def test_a_run_goes_on(how: tuple[str, ...], tmp_path: Path) -> None:
    """A run that was ended after two of four steps goes on as one that was not; a GPU adds in no fixed order."""
    losses, accuracies = learned(fit(tmp_path / "whole", *SHORT, *how)[0])
    half = tmp_path / "half"
    fit(half, *SHORT, *how, "--trainer.max_epochs", "1")
    found = learned(fit(half, *SHORT, *how, "--ckpt_path", "last")[0])
    assert len(losses) == 4
    assert found[0] == pytest.approx(losses, rel=0.05)
    assert found[1] == pytest.approx(accuracies, abs=0.05)


def test_a_run_is_that_of_a_cpu(tmp_path: Path) -> None:
    """Twenty steps of OPSD, all weights in fp32: the same rollouts, but for those that rounding turns."""
    options = ("--config", "opsd.yaml", "--config", "up_to_error.yaml")
    on_gpu, on_cpu = (learned(fit(tmp_path / device, *options, device=device)[0]) for device in ("gpu", "cpu"))
    assert on_gpu[0][0] == pytest.approx(on_cpu[0][0], rel=1e-3)
    assert on_gpu[1] == pytest.approx(on_cpu[1], abs=0.03)


@pytest.mark.parametrize("gib", [1.5, 1.0])
def test_memory_that_runs_out_costs_no_step(gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may have a small part of the GPU: its micro-batches are halved, and the run goes on."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "head_dim": 128}
    model = write_model(tmp_path / "model", "qwen3", num_attention_heads=8, num_key_value_heads=4, **sizes)
    options = ("--config", "opsd.yaml", *LORA, "--policy.model", str(model), "--trainer.max_epochs", "1")
    options += ("--data.val.size", "4", "--data.evaluation.samples", "1", "--data.engine.batch_size", "64")
    options += ("--data.steps_per_epoch", "2", "--model.tokens_per_micro_batch", "8192")
    total = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"per_process_memory_fraction:{gib * 2**30 / total}")
    rows, said = fit(tmp_path / "small", *options)
    assert len(learned(rows)[0]) == 2
    assert "Out of memory: now" in said
