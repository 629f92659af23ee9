"""Adaptive LayerNorm and gated residual as differentiable operations over the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ross_kernels.adaln import triton_impl


class LayerNormModulate(torch.autograd.Function):
    """Keeps x and scale for backward; no statistics, no intermediate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return triton_impl.layernorm_modulate(x, shift, scale, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        grad_x, grad_scale = triton_impl.layernorm_modulate_backward(grad, x, scale, ctx.eps)
        return grad_x, grad, grad_scale, None


class GatedResidual(torch.autograd.Function):
    """Keeps gate and y for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y)
        return triton_impl.gated_residual(x, gate, y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, y = ctx.saved_tensors
        return grad, *triton_impl.gated_residual_backward(grad, gate, y)
