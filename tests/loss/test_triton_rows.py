"""The kernel for GPUs, without one: interpreted against the passes over tiles, and built for two generations."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import interpreted_rows
import pytest
import torch
from interpreted_rows import CASES, Case
from torch import Tensor

from ogls import loss
from ogls.loss import chunked as kernels
from ogls.loss.divergence import ForwardKL
from ogls.loss.topk import TopK

pytest.importorskip("triton", reason="triton comes with vLLM and with torch for GPUs")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[Tensor, ...]]:
    file = tmp_path_factory.mktemp("interpreted") / "rows.pt"
    command = [sys.executable, interpreted_rows.__file__, str(file)]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
    return dict(zip(CASES, torch.load(file, weights_only=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_does_as_the_tiles(case: Case, interpreted: dict[Case, tuple[Tensor, ...]]) -> None:
    rounding = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}[case.dtype]
    *of_tokens, logits = case.run(kernels.divergence_rows)
    *by_kernel, gradient = interpreted[case]
    for ours, theirs in zip(by_kernel, of_tokens, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
    if case.further:
        step = 2.0**-7 if case.dtype == torch.bfloat16 else rounding  # the interpreter cuts where a GPU rounds
        torch.testing.assert_close(gradient, logits, rtol=step, atol=rounding)


def test_without_a_gradient_the_logits_stay(interpreted: dict[Case, tuple[Tensor, ...]]) -> None:
    found = {case: values[2] for case, values in interpreted.items() if not case.further}
    first = {case.dtype: logits for case, logits in found.items()}
    assert all(torch.equal(logits, first[case.dtype]) for case, logits in found.items())
    assert first[torch.float64][0, -1] == 40.0


def test_who_gets_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(ForwardKL):
        """Something of one's own, that only its `terms` know."""

    def kernel() -> None: ...

    monkeypatch.setattr(loss, "triton_rows", SimpleNamespace(divergence_rows=kernel, KINDS=(ForwardKL,)), raising=False)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert kernels.passes(ForwardKL(), None, cuda, False).func is kernel
    for divergence, device, compiled in ((ForwardKL(), cpu, False), (Own(), cuda, False), (ForwardKL(), cuda, True)):
        assert kernels.passes(divergence, None, device, compiled).func is kernels.for_each_tile
    assert kernels.passes(ForwardKL(), TopK(2), cuda, False).func is kernels.for_each_tile  # it knows none


def as_it_is() -> ModuleType:
    """The module without the tests' run-time checks, which Triton would take for a part of the kernel."""
    spec = importlib.util.spec_from_file_location("unchecked", Path(kernels.__file__).with_name("triton_rows.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("divergence", ["ForwardKL", "JensenShannon"])
def test_it_builds_for_gpus(divergence: str, clip: float | None, architecture: int) -> None:
    """Down to machine code, for bf16 logits; the widest loads show that Triton knows how rows are aligned."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module = as_it_is()
    tensors = {"logits": "*bf16", "gaps": "*bf16", "values": "*fp32", "ids": "*i64", "logprobs": "*fp32"}
    tensors |= {"vocab": "i32"}
    constants = {"KIND": divergence, "WEIGHT": 0.5, "TEMPERATURE": 1.0, "CLIP": clip, "ONE_SIDED": False}
    constants |= {"GRADIENT": True, "LARGE": 80.0, "BLOCK": module.BLOCK}
    source = ASTSource(
        fn=module._rows,
        signature=tensors | dict.fromkeys(constants, "constexpr"),
        constexprs={(len(tensors) + i,): value for i, value in enumerate(constants.values())},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(tensors))},
    )
    built = compile(source, target=GPUTarget("cuda", architecture, 32), options=module.OPTIONS)
    assert built.asm["cubin"]
    assert "ld.global.v4.b32" in built.asm["ptx"]
