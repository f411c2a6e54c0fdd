"""The kernels for GPUs, without one: interpreted against the passes over tiles, and built for two generations."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import interpreted_rows
import pytest
import torch
from interpreted_rows import BUDGETS, CASES, QWEN3, TOP, Case, alphas
from torch import Tensor

from ogls import loss
from ogls.loss import chunked as kernels
from ogls.loss.alpha_bound import HALVINGS, bisect_tile
from ogls.loss.divergence import ForwardKL
from ogls.loss.topk import TopK, topk_rows

pytest.importorskip("triton", reason="triton comes with vLLM and with torch for GPUs")


Results = dict[Case | float, tuple[Tensor, ...]]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Results:
    file = tmp_path_factory.mktemp("interpreted") / "rows.pt"
    command = [sys.executable, interpreted_rows.__file__, str(file)]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
    results = torch.load(file, weights_only=True)
    return {
        case: result
        for some in zip((CASES, TOP, QWEN3, BUDGETS), results, strict=True)
        for case, result in zip(*some, strict=True)
    }


@pytest.mark.parametrize("case", [*CASES, *TOP, *QWEN3], ids=str)
def test_the_kernel_does_as_the_tiles(case: Case, interpreted: Results) -> None:
    rounding = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}[case.dtype]
    *of_tokens, logits = case.run(kernels.divergence_rows if case.support is None else topk_rows)
    *by_kernel, gradient = interpreted[case]
    for ours, theirs in zip(by_kernel, of_tokens, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
    if case.further:
        step = 2.0**-7 if case.dtype == torch.bfloat16 else rounding  # the interpreter cuts where a GPU rounds
        torch.testing.assert_close(gradient, logits, rtol=step, atol=rounding)


@pytest.mark.parametrize("epsilon", BUDGETS)
def test_the_kernel_finds_the_largest_alpha(epsilon: float, interpreted: Results) -> None:
    expected = alphas(bisect_tile, epsilon)
    torch.testing.assert_close(interpreted[epsilon], expected, rtol=0.0, atol=4.0 / 2**HALVINGS)
    assert (expected[1], len(expected.unique()) > 1) == (4.0, epsilon < 100.0)


def test_without_a_gradient_the_logits_stay(interpreted: Results) -> None:
    found = {case: interpreted[case][2] for case in CASES if not case.further}
    first = {case.dtype: logits for case, logits in found.items()}
    assert all(torch.equal(logits, first[case.dtype]) for case, logits in found.items())
    assert first[torch.float64][0, -1] == 40.0


def test_who_gets_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(ForwardKL):
        """Something of one's own, that only its `terms` know."""

    def kernel() -> None: ...

    def of_top() -> None: ...

    monkeypatch.setattr(loss, "triton_rows", SimpleNamespace(divergence_rows=kernel, KINDS=(ForwardKL,)), raising=False)
    monkeypatch.setattr(loss, "triton_topk", SimpleNamespace(topk_rows=of_top), raising=False)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert kernels.passes(ForwardKL(), None, cuda, torch.float64).func is kernel
    for divergence, device in ((ForwardKL(), cpu), (Own(), cuda)):
        assert kernels.passes(divergence, None, device, torch.float64).func is kernels.for_each_tile
    assert kernels.passes(Own(), TopK(2), cuda, torch.float64).func is of_top
    assert kernels.passes(ForwardKL(), TopK(2, "union"), cuda, torch.float64).func is kernels.for_each_tile
    assert kernels.passes(ForwardKL(), TopK(2), cpu, torch.float64).func is kernels.for_each_tile


def as_it_is(name: str, package: str = "loss") -> ModuleType:
    """The module without the tests' run-time checks, which Triton would take for a part of the kernel."""
    file = Path(kernels.__file__).parents[1] / package / f"{name}.py"
    spec = importlib.util.spec_from_file_location("unchecked", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_for(architecture: int, module: ModuleType, kernel: str, tensors: dict[str, str], constants: dict) -> str:
    """The kernel's assembler code; the widest loads show that Triton knows how rows are aligned."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    source = ASTSource(
        fn=getattr(module, kernel),
        signature=tensors | dict.fromkeys(constants, "constexpr"),
        constexprs={(len(tensors) + i,): value for i, value in enumerate(constants.values())},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(tensors))},
    )
    options = getattr(module, "OPTIONS", {})
    built = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert built.asm["cubin"]
    assert "ld.global.v4.b32" in built.asm["ptx"]
    return built.asm["ptx"]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("divergence", ["ForwardKL", "JensenShannon"])
def test_rows_are_built_for_gpus(divergence: str, clip: float | None, architecture: int) -> None:
    """Down to machine code, for bf16 logits."""
    module = as_it_is("triton_rows")
    tensors = {"logits": "*bf16", "gaps": "*bf16", "values": "*fp32", "ids": "*i64", "logprobs": "*fp32"}
    constants = {"KIND": divergence, "WEIGHT": 0.5, "TEMPERATURE": 1.0, "CLIP": clip, "ONE_SIDED": False}
    constants |= {"GRADIENT": True, "LARGE": 80.0, "BLOCK": module.BLOCK}
    built_for(architecture, module, "_rows", tensors | {"vocab": "i32"}, constants)


BUDGET = {"ALPHA_MAX": 4.0, "EPSILON": 0.1, "HALVINGS": HALVINGS}


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("name", "kernel", "tensors", "constants"),
    [
        ("triton_topk", "_tails", "logits:bf16 gaps:bf16 student:fp32 target:fp32", {"TEMPERATURE": 1.0}),
        ("triton_topk", "_gradients", "logits:bf16 factors:fp32 normalisers:fp32", {"TEMPERATURE": 1.0}),
        ("triton_alpha", "_alphas", "logits:bf16 deltas:bf16 alphas:fp32", BUDGET),
    ],
)
def test_the_other_kernels_are_built_for_gpus(
    name: str, kernel: str, tensors: str, constants: dict, architecture: int
) -> None:
    module: Any = as_it_is(name)
    module.load_block = as_it_is("triton_rows").load_block
    types = {key: f"*{dtype}" for key, dtype in (pair.split(":") for pair in tensors.split())}
    built_for(architecture, module, kernel, types | {"vocab": "i32"}, constants | {"BLOCK": module.BLOCK})
