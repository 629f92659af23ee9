"""Tensor parallelism by sharing work: every rank holds a whole small module and handles its share of the images.

The vision tower and the denoiser are small next to the LLM, so sharding their matrices would add an all-reduce per
layer. Each tensor-parallel rank instead takes a contiguous share of the microbatch's images. Gradients of such modules
are partial on each rank; `parallel/grad_sync.py` sums them over the tensor-parallel group.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


class _GatherShares(torch.autograd.Function):
    """All-gather of padded shares along dim 0; backward hands every rank the gradient of its own share.

    What follows is computed identically on every rank (or sums its gradient first), so no reduction is needed here.
    """

    @staticmethod
    def forward(ctx, padded: Tensor, group) -> Tensor:
        ctx.group, ctx.rows = group, padded.shape[0]
        gathered = padded.new_empty((group.size() * padded.shape[0], *padded.shape[1:]))
        torch.distributed.all_gather_into_tensor(gathered, padded.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        start = ctx.group.rank() * ctx.rows
        return grad[start : start + ctx.rows].contiguous(), None


def gather_shares(share: Tensor, num_items: int, group) -> Tensor:
    """Join the ranks' shares [n_share, ...] into [num_items, ...] on every rank. All ranks must call it."""
    if group.size() == 1 or num_items == 0:
        return share
    chunk = -(-num_items // group.size())
    padding = share.new_zeros((chunk - share.shape[0], *share.shape[1:]))
    return _GatherShares.apply(torch.cat([share, padding]), group)[:num_items]


class _SumGradient(torch.autograd.Function):
    """Identity; backward sums the gradient over the group.

    Megatron's `copy_to_tensor_model_parallel_region` does the same but loses the sum when the gradient is not
    contiguous (it reduces a temporary copy), and heads that pick rows send back just such gradients.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def to_heads(hidden: Tensor, *, sequence_parallel: bool, tp_group) -> Tensor:
    """Full hidden states [s, b, h] for heads whose gradients differ per tensor-parallel rank.

    Backward sums the ranks' gradients (and scatters them again under sequence parallelism), which suits both a head
    that holds a vocabulary shard and a denoiser that handles a share of the images.
    """
    if sequence_parallel and tp_group.size() > 1:
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp_group)
    return _SumGradient.apply(hidden, tp_group) if tp_group.size() > 1 else hidden
