"""GPU kernels make the elementwise work of a layer between its products, and of its gradient.

Each is one operation of torch with an autograd formula, so that shapes can be worked out without a GPU. Numbers are
computed in fp32 (in fp64 if they are fp64) and rounded once.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# Inside kernels it is Triton's language, which is not quite Python's.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

BLOCK = 1024


@custom_op("ogls::swiglu", mutates_args=(), schema="(Tensor gate, Tensor up) -> Tensor")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up, with silu(x) = x / (1 + e^-x); both of the same shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    size = gate.numel()
    _swiglu[(triton.cdiv(size, BLOCK),)](gate, up, out, size, BLOCK=BLOCK)
    return out


@custom_op("ogls::swiglu_backward", mutates_args=(), schema="(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate and up: with s = 1 / (1 + e^-gate) they are grad up s (1 + gate (1 - s)) and
    grad gate s.
    """
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    size = gate.numel()
    _swiglu_backward[(triton.cdiv(size, BLOCK),)](grad, gate, up, of_gate, of_up, size, BLOCK=BLOCK)
    return of_gate, of_up


@custom_op("ogls::rotated", mutates_args=(), schema="(Tensor x, Tensor cos, Tensor sin, bool back=False) -> Tensor")
def rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """Returns the heads of one row of tokens, rotated by their positions, or rotated back by the transpose of that.

    With the halves x1, x2 of a head it is (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2), and back (x1 cos1 + x2 sin2,
    x2 cos2 - x1 sin1), which is the gradient.

    Args:
        x: queries or keys, [1, heads, tokens, d]
        cos: cosines of the angles, [1, tokens, d]
        sin: their sines, [1, tokens, d]
        back: whether to rotate back
    """
    out, (_, heads, tokens, size) = _rows_like(x), x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    x = x if x.stride(3) == 1 else x.contiguous()
    _rotate[(tokens,)](
        *(x, cos, sin, out, heads, x.stride(1), x.stride(2), out.stride(1), out.stride(2)),
        HALF=size // 2,
        HEADS=triton.next_power_of_2(heads),
        COLUMNS=triton.next_power_of_2(size // 2),
        BACK=back,
    )
    return out


def _rows_like(x: Tensor) -> Tensor:
    """Returns an empty tensor of x's shape in which the heads of a token lie side by side, as attention wants them."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


swiglu.register_fake(lambda gate, up: torch.empty_like(gate))
swiglu_backward.register_fake(lambda grad, gate, up: (torch.empty_like(gate), torch.empty_like(up)))
rotated.register_fake(lambda x, cos, sin, back=False: _rows_like(x))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps gate and up, or cos and sin."""
    ctx.save_for_backward(*(inputs if len(inputs) == 2 else inputs[1:3]))


swiglu.register_autograd(lambda ctx, grad: swiglu_backward(grad, *ctx.saved_tensors), setup_context=_keep)
rotated.register_autograd(
    lambda ctx, grad: (rotated(grad, *ctx.saved_tensors, back=True), None, None, None), setup_context=_keep
)


@triton.jit
def _swiglu(gates, ups, outs, size, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    gate, up = _wide(gates, places, inside), _wide(ups, places, inside)
    tl.store(outs + places, (gate / (1.0 + tl.exp(-gate)) * up).to(outs.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(grads, gates, ups, of_gates, of_ups, size, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    grad, gate, up = _wide(grads, places, inside), _wide(gates, places, inside), _wide(ups, places, inside)
    s = 1.0 / (1.0 + tl.exp(-gate))
    of_gate, of_up = grad * up * s * (1.0 + gate * (1.0 - s)), grad * gate * s
    tl.store(of_gates + places, of_gate.to(of_gates.dtype.element_ty), mask=inside)
    tl.store(of_ups + places, of_up.to(of_ups.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    xs,
    cosines,
    sines,
    outs,
    heads,
    head_step,
    token_step,
    out_head_step,
    out_token_step,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, COLUMNS)[None, :]
    angles, real = token * 2 * HALF + column, column < HALF
    inside = real & (head < heads)
    places = token * token_step + head * head_step + column
    x1, x2 = _wide(xs, places, inside), _wide(xs, places + HALF, inside)
    c1, c2 = _wide(cosines, angles, real), _wide(cosines, angles + HALF, real)
    s1, s2 = _wide(sines, angles, real), _wide(sines, angles + HALF, real)
    if BACK:
        s1, s2 = -s2, -s1
    places = token * out_token_step + head * out_head_step + column
    tl.store(outs + places, (x1 * c1 - x2 * s1).to(outs.dtype.element_ty), mask=inside)
    tl.store(outs + places + HALF, (x2 * c2 + x1 * s2).to(outs.dtype.element_ty), mask=inside)


@triton.jit
def _wide(pointer, places, inside):
    """Loads numbers as fp32, or as fp64 if they are."""
    x = tl.load(pointer + places, mask=inside, other=0.0)
    return x if x.dtype == tl.float64 else x.to(tl.float32)
