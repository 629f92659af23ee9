"""The squared error as a differentiable operation: its backward draws eps again instead of keeping it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ross_kernels.noise_mse import triton_impl
from ross_kernels.noise_mse.noise import Noise


class NoiseMse(torch.autograd.Function):
    """predicted [K, n, N, C4] -> float32 [K, n]; keeps `predicted` for backward."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, noise: Noise) -> Tensor:
        predicted = predicted.contiguous()
        ctx.save_for_backward(predicted)
        ctx.noise = noise
        return triton_impl.mse_sums(predicted, noise)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, row_grad: Tensor) -> tuple[Tensor, None]:
        (predicted,) = ctx.saved_tensors
        return triton_impl.mse_backward(row_grad, predicted, ctx.noise), None
