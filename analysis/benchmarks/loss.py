"""Time and peak memory of the loss against autograd over all logits, TRL, Liger, and three bare GEMMs.

    python analysis/benchmarks/loss.py                      # T=512, V=49152, d=576, K=8, bf16
    python analysis/benchmarks/loss.py --tokens 1024 --vocab 151936 --hidden 2048 --rounds 7

Every side starts from the same final-norm states of K + 1 views and of the student, and ends with the gradient of the
student's states. Agreement with autograd in fp64 is asserted before anything is timed. Peak memory is that of a second
call in a fresh process over what the first one left, scratch memory included. TRL's chunked divergence and Liger's
chunked JSD take part where they are installed: `pip install trl==1.16.0 liger-kernel==0.8.5`.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from harness import announce, installed, log, parser, peak_mib, report, time_sides
from torch import Tensor

from ogls.loss import cpu_rows
from ogls.loss.chunked import chunked_divergence
from ogls.loss.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL, SkewKL
from ogls.loss.steering import OutcomeSteering
from ogls.records import Role

FLOOR = "three bare GEMMs"
ALPHA = 1.0


@dataclass
class Inputs:
    """Inputs are states [tokens, hidden] of the student and of K + 1 views (plain, successes, failures) and the head
    [vocab, hidden]."""

    student: Tensor
    views: list[Tensor]
    weight: Tensor

    def __post_init__(self) -> None:
        half = (len(self.views) - 1) // 2
        roles: list[Role] = ["plain"]
        roles.extend("success" if view < half else "failure" for view in range(len(self.views) - 1))
        self.anchor, self.direction = OutcomeSteering(alpha=ALPHA).coefficients(roles)

    def combined(self) -> Tensor:
        """Returns the target's states, accumulated in fp32 (fp64 for fp64 states)."""
        total = torch.zeros_like(self.student, dtype=torch.promote_types(self.student.dtype, torch.float32))
        for view, a, d in zip(self.views, self.anchor, self.direction, strict=True):
            total.add_(view, alpha=a + ALPHA * d)
        return total


def make_inputs(tokens: int, vocab: int, hidden: int, views: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(tokens, hidden, generator=generator)
    near = [student + 0.1 * torch.randn(tokens, hidden, generator=generator) for _ in range(views + 1)]
    weight = torch.randn(vocab, hidden, generator=generator) * hidden**-0.5
    return Inputs(student.to(dtype), [view.to(dtype) for view in near], weight.to(dtype))


def ours(inputs: Inputs, divergence: Divergence) -> tuple[Tensor, Tensor]:
    student = inputs.student.detach().requires_grad_()
    values, _ = chunked_divergence(student, inputs.combined(), inputs.weight, None, divergence)
    values.mean().backward()
    assert student.grad is not None
    return values.detach(), student.grad


def by_torch(inputs: Inputs, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Runs our loss as it runs where there is no C++ compiler."""
    with mock.patch.object(cpu_rows, "knows", return_value=False):
        return ours(inputs, divergence)


def by_autograd(student: Tensor, target_logits: Tensor, weight: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Runs the obvious code: log_softmax of both sides, the formula, backward. beta = 0 is the forward KL."""
    student = student.detach().requires_grad_()
    logits = student @ weight.T
    log_p = logits.to(target_logits.dtype).log_softmax(-1)
    log_q = target_logits.log_softmax(-1)
    q = log_q.exp()
    if beta:
        log_m = torch.logaddexp(log_p + np.log(1 - beta), log_q + np.log(beta))
        values = (beta * q * (log_q - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)).sum(-1)
    else:
        values = (q * (log_q - log_p)).sum(-1)
    values.mean().backward()
    assert student.grad is not None
    return values.detach(), student.grad


def naive_steered(inputs: Inputs, beta: float) -> tuple[Tensor, Tensor]:
    """Applies a head for every view: the target's logits are the steered sum of K + 1 logits."""
    with torch.no_grad():
        target: Tensor | None = None
        for view, a, d in zip(inputs.views, inputs.anchor, inputs.direction, strict=True):
            logits = view @ inputs.weight.T
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            target = (a + ALPHA * d) * logits if target is None else target.add_(logits, alpha=a + ALPHA * d)
    assert target is not None
    return by_autograd(inputs.student, target, inputs.weight, beta)


def naive_combined(inputs: Inputs, beta: float) -> tuple[Tensor, Tensor]:
    """Applies one head to the combined states, then autograd over all logits."""
    with torch.no_grad():
        states = inputs.combined()
        logits = states.to(inputs.weight.dtype) @ inputs.weight.T
    return by_autograd(inputs.student, logits.to(states.dtype), inputs.weight, beta)


def trl(inputs: Inputs, beta: float) -> tuple[Tensor, Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore[reportMissingImports]

    student = inputs.student.detach().requires_grad_()
    target = inputs.combined().to(inputs.weight.dtype)
    head = inputs.weight
    values, _ = ChunkedDivergenceFunction.apply(
        student, head, None, target, head, None, beta, 1.0, 1.0, None, 1.0, None
    )
    values.mean().backward()
    assert student.grad is not None
    return values.detach(), student.grad


def liger(inputs: Inputs, beta: float) -> tuple[Tensor, Tensor]:
    """Runs Liger at the best of what it offers: no hard loss, torch.compile. It gives the mean over tokens, makes the
    head's gradient too, and takes the log-softmax in the head's dtype.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    student = inputs.student.detach().requires_grad_()
    target, labels = inputs.combined().to(inputs.weight.dtype), torch.zeros(len(student), dtype=torch.long)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    value = loss(student, inputs.weight, target, inputs.weight, labels)
    value.backward()
    assert student.grad is not None
    return value.detach(), student.grad


def three_gemms(inputs: Inputs, buffers: dict[str, Tensor]) -> None:
    """Runs what no loss with two heads and a gradient can do without; outputs are allocated once."""
    shape = len(inputs.student), len(inputs.weight)
    logits = buffers.setdefault("logits", inputs.weight.new_empty(shape))
    gaps = buffers.setdefault("gaps", inputs.weight.new_empty(shape))
    torch.mm(inputs.student, inputs.weight.T, out=logits)
    torch.mm(inputs.views[0], inputs.weight.T, out=gaps)
    torch.mm(logits, inputs.weight, out=buffers.setdefault("gradient", torch.empty_like(inputs.student)))


def sides(inputs: Inputs) -> dict[str, Callable[[], object]]:
    one_view = Inputs(inputs.student, inputs.views[:2] + inputs.views[-1:], inputs.weight)
    table: dict[str, Callable[[], object]] = {
        FLOOR: functools.partial(three_gemms, inputs, {}),
        "ours, forward KL": functools.partial(ours, inputs, ForwardKL()),
        "ours, forward KL, one view a pool": functools.partial(ours, one_view, ForwardKL()),
        "ours, reverse KL": functools.partial(ours, inputs, ReverseKL()),
        "ours, JSD(0.5)": functools.partial(ours, inputs, JensenShannon()),
        "ours, skew KL(0.1)": functools.partial(ours, inputs, SkewKL()),
        "ours, forward KL, torch operations": functools.partial(by_torch, inputs, ForwardKL()),
        "ours, JSD(0.5), torch operations": functools.partial(by_torch, inputs, JensenShannon()),
        "ours, skew KL(0.1), torch operations": functools.partial(by_torch, inputs, SkewKL()),
        "naive, K + 1 heads, forward KL": functools.partial(naive_steered, inputs, 0.0),
        "naive, combined states, forward KL": functools.partial(naive_combined, inputs, 0.0),
        "naive, combined states, JSD(0.5)": functools.partial(naive_combined, inputs, 0.5),
    }
    if installed("trl"):
        table["TRL, combined states, forward KL"] = functools.partial(trl, inputs, 0.0)
        table["TRL, combined states, JSD(0.5)"] = functools.partial(trl, inputs, 0.5)
    if installed("liger-kernel"):
        table["Liger, combined states, forward KL"] = functools.partial(liger, inputs, 0.0)
        table["Liger, combined states, JSD(0.5)"] = functools.partial(liger, inputs, 0.5)
    return table


def assert_agreement(views: int) -> None:
    """Checks in fp64 that values and gradients of every side that has them are those of K + 1 heads and autograd."""
    small = make_inputs(37, 211, 16, views, torch.float64)
    for divergence, beta in ((ForwardKL(), 0.0), (JensenShannon(), 0.5)):
        truth = naive_steered(small, beta)
        tried = {"ours": ours(small, divergence), "naive, combined": naive_combined(small, beta)}
        if installed("trl"):
            tried["TRL"] = trl(small, beta)
        if installed("liger-kernel"):
            tried["Liger"] = liger(small, beta)
        for name, (values, gradient) in tried.items():
            tolerance = 1e-5 if name in ("TRL", "Liger") else 1e-10  # some of theirs is fp32 whatever they are given
            for a, b in ((values.mean(), truth[0].mean()), (gradient, truth[1])):
                torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())
        for name in ("ours", "naive, combined"):
            torch.testing.assert_close(tried[name][0], truth[0], rtol=1e-10, atol=1e-12)
    print("agreement with K + 1 heads and autograd in fp64: values and gradients to 1e-10 (TRL and Liger: 1e-5)")


def main() -> None:
    options = parser(__doc__ or "", rounds=9)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--vocab", type=int, default=49152)
    options.add_argument("--hidden", type=int, default=576)
    options.add_argument("--views", type=int, default=8, help="K: views beside the plain one, half of them failures")
    options.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options.add_argument("--only", nargs="*", default=[""], help="sides whose name contains one of these; GEMMs always")
    options.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    inputs = make_inputs(args.tokens, args.vocab, args.hidden, args.views, getattr(torch, args.dtype))
    table = sides(inputs)
    if args.peak_of:
        print(peak_mib(table[args.peak_of]))
        return

    announce(args)
    table = {name: side for name, side in table.items() if name == FLOOR or any(part in name for part in args.only)}
    assert_agreement(args.views)
    seconds = time_sides(table, args)

    def peak(name: str) -> float:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    figures = report(seconds, FLOOR, args, {name: functools.partial(peak, name) for name in table})
    log("loss", figures, args)


if __name__ == "__main__":
    main()
