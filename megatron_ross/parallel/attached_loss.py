"""A loss computed before the last pipeline stage: attached to the hidden states that are passed on.

Identity in the forward pass; in the backward pass the loss receives gradient 1 (times the optimizer's loss scale), as
if it had been added to the loss of the last stage. The same idea carries Megatron's MoE auxiliary losses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, loss: Tensor, grad_scale_func: Callable[[Tensor], Tensor] | None) -> Tensor:
        ctx.grad_scale_func = grad_scale_func
        ctx.save_for_backward(loss)
        return hidden

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        one = torch.ones_like(loss)
        return grad, one if ctx.grad_scale_func is None else ctx.grad_scale_func(one), None


def attach_loss(hidden: Tensor, loss: Tensor, grad_scale_func: Callable[[Tensor], Tensor] | None) -> Tensor:
    """`hidden` [s, b, h], carrying the gradient of the scalar `loss` with it."""
    return _AttachLoss.apply(hidden, loss, grad_scale_func)
