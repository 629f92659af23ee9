"""Adaptive LayerNorm per token as Triton kernels: one program per token, which holds its whole row in registers.

Rows may be strided, so that shift, scale and gate are read in place as slices of one [..., 6 D] projection. Arithmetic
is float32 and every result is rounded once. The backward pass computes mean and variance again: the row is there
anyway.

Shape legend: R rows (tokens of all images and draws), D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384
"""A row has to fit into the registers of one program."""


@triton.jit
def _load_row(base, row, stride, offsets, mask):
    return tl.load(base + row * stride + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_row(base, row, offsets, mask, width, value):
    tl.store(base + row * width + offsets, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _normalize(x, mask, width, eps):
    """(normalised row, 1 / standard deviation); masked places are zero."""
    centred = tl.where(mask, x - tl.sum(x, axis=0) / width, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    return centred * rstd, rstd


@triton.jit
def _modulate_kernel(out, x, shift, scale, x_stride, shift_stride, scale_stride, width, eps, BLOCK: tl.constexpr):
    """out [R, D] contiguous; x, shift, scale [R, D] with row strides; grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < width
    normalized, _rstd = _normalize(_load_row(x, row, x_stride, offsets, mask), mask, width, eps)
    factor = 1.0 + _load_row(scale, row, scale_stride, offsets, mask)
    result = normalized * factor + _load_row(shift, row, shift_stride, offsets, mask)
    _store_row(out, row, offsets, mask, width, result)


@triton.jit
def _modulate_backward_kernel(
    grad_x, grad_scale, grad, x, scale, grad_stride, x_stride, scale_stride, width, eps, BLOCK: tl.constexpr
):
    """grad_x, grad_scale [R, D] contiguous; the gradient of shift is `grad` itself; grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < width
    normalized, rstd = _normalize(_load_row(x, row, x_stride, offsets, mask), mask, width, eps)
    dy = _load_row(grad, row, grad_stride, offsets, mask)
    _store_row(grad_scale, row, offsets, mask, width, dy * normalized)
    dn = dy * (1.0 + _load_row(scale, row, scale_stride, offsets, mask))
    mean_dn = tl.sum(dn, axis=0) / width
    mean_product = tl.sum(dn * normalized, axis=0) / width
    _store_row(grad_x, row, offsets, mask, width, rstd * (dn - mean_dn - normalized * mean_product))


@triton.jit
def _gate_kernel(out, x, gate, y, x_stride, gate_stride, y_stride, width, BLOCK: tl.constexpr):
    """out = x + gate y; out [R, D] contiguous, the others with row strides; grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < width
    product = _load_row(gate, row, gate_stride, offsets, mask) * _load_row(y, row, y_stride, offsets, mask)
    _store_row(out, row, offsets, mask, width, _load_row(x, row, x_stride, offsets, mask) + product)


@triton.jit
def _gate_backward_kernel(
    grad_gate, grad_y, grad, gate, y, grad_stride, gate_stride, y_stride, width, BLOCK: tl.constexpr
):
    """grad_gate = grad y, grad_y = grad gate, [R, D] contiguous; the gradient of x is `grad` itself; grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < width
    dout = _load_row(grad, row, grad_stride, offsets, mask)
    _store_row(grad_gate, row, offsets, mask, width, dout * _load_row(y, row, y_stride, offsets, mask))
    _store_row(grad_y, row, offsets, mask, width, dout * _load_row(gate, row, gate_stride, offsets, mask))


INTERPRETED = not isinstance(_modulate_kernel, triton.runtime.JITFunction)


def _rows(tensor: Tensor) -> Tensor:
    """[..., D] -> [R, D] whose rows are contiguous; a view wherever the strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _launch_shape(width: int, block: int | None) -> dict[str, int]:
    """Block size (any power of two that holds a row) and warps: about eight elements per thread."""
    block = block or triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, block: int | None = None) -> Tensor:
    """`reference.layernorm_modulate`; inputs are checked by the public call."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        x_rows, shift, scale = _rows(x), _rows(shift), _rows(scale)
        num_rows, width = x_rows.shape
        _modulate_kernel[(num_rows,)](
            out, x_rows, shift, scale, x_rows.stride(0), shift.stride(0), scale.stride(0), width, eps,
            **_launch_shape(width, block),
        )  # fmt: skip
    return out


def layernorm_modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, *, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and scale; that of shift is `grad`."""
    grad_x, grad_scale = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if grad_x.numel():
        grad, x, scale = _rows(grad), _rows(x), _rows(scale)
        num_rows, width = x.shape
        _modulate_backward_kernel[(num_rows,)](
            grad_x, grad_scale, grad, x, scale, grad.stride(0), x.stride(0), scale.stride(0), width, eps,
            **_launch_shape(width, block),
        )  # fmt: skip
    return grad_x, grad_scale


def gated_residual(x: Tensor, gate: Tensor, y: Tensor, *, block: int | None = None) -> Tensor:
    """`reference.gated_residual`; inputs are checked by the public call."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        x_rows, gate, y = _rows(x), _rows(gate), _rows(y)
        num_rows, width = x_rows.shape
        _gate_kernel[(num_rows,)](
            out, x_rows, gate, y, x_rows.stride(0), gate.stride(0), y.stride(0), width, **_launch_shape(width, block)
        )
    return out


def gated_residual_backward(
    grad: Tensor, gate: Tensor, y: Tensor, *, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and y; that of x is `grad`."""
    grad_gate, grad_y = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for _ in range(2))
    if grad_y.numel():
        grad, gate, y = _rows(grad), _rows(gate), _rows(y)
        num_rows, width = y.shape
        _gate_backward_kernel[(num_rows,)](
            grad_gate, grad_y, grad, gate, y, grad.stride(0), gate.stride(0), y.stride(0), width,
            **_launch_shape(width, block),
        )  # fmt: skip
    return grad_gate, grad_y
