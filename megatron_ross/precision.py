"""Arithmetic of the modules that are not the decoder: stored dtype, and TF32 products where they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
"""What a setting like `denoiser_dtype` computes with; TF32 is a way to multiply float32."""


def in_tf32(compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`compute(*inputs)`, whose float32 products use TF32 in the forward and in the backward pass, and no others do.

    The backward pass runs long after this call: it switches TF32 on where it enters at the output and off again where
    it leaves at the first input that needs a gradient. Without such an input the backward pass stays in full fp32.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    first = next((i for i, x in enumerate(inputs) if x.requires_grad), None) if torch.is_grad_enabled() else None
    if first is not None and not before:
        inputs = tuple(_Switch.apply(x, before) if i == first else x for i, x in enumerate(inputs))
    matmul.allow_tf32 = True
    try:
        output = compute(*inputs)
    finally:
        matmul.allow_tf32 = before
    return output if first is None or before else _Switch.apply(output, True)


class _Switch(torch.autograd.Function):
    """Identity; its backward sets whether later products may use TF32."""

    @staticmethod
    def forward(ctx, x: Tensor, allow_tf32: bool) -> Tensor:
        ctx.allow_tf32 = allow_tf32
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        torch.backends.cuda.matmul.allow_tf32 = ctx.allow_tf32
        return grad, None
