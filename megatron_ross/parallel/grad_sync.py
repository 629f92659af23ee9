"""Gradient finalisation: what has to be reduced after the last backward pass of a step.

data parallel      Megatron's DDP buffers (sum; losses are already normalised globally)
tensor parallel    sum for modules that share work (tower, projector, denoiser), and norms under sequence parallelism
tied embeddings    sum between the copies of E and H, be they on two pipeline ranks or in two chunks of one
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_ross.parallel.groups import ParallelGroups

_SHARED_WORK = "sum_gradient_over_tensor_parallel"


def mark_shared_work(module: nn.Module) -> None:
    """Declare that each tensor-parallel rank computes a part of these parameters' gradients."""
    for parameter in module.parameters():
        setattr(parameter, _SHARED_WORK, True)


def finalize_gradients(chunks: list[DistributedDataParallel], groups: ParallelGroups) -> None:
    """Complete every gradient of this rank's chunks; the result needs no further scaling."""
    for chunk in chunks:
        chunk.finish_grad_sync()
    parameters = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    if groups.tp.size() > 1:
        _sum_over(groups.tp, (p.main_grad for p in parameters if _is_partial(p)))
    _sum_tied([p.main_grad for p in parameters if getattr(p, "shared_embedding", False)], groups.tied)


def _is_partial(parameter: nn.Parameter) -> bool:
    return getattr(parameter, _SHARED_WORK, False) or getattr(parameter, "sequence_parallel", False)


def _sum_tied(copies: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Give every copy of a tied weight's gradient the sum over all of them, on this rank and on the others of `group`.

    Data-parallel ranks hold the reduced gradient of their own slice only. The slices of all copies are alike, because
    Megatron gives a weight that is marked `shared_embedding` a bucket of its own.
    """
    if not copies:
        return
    first, *others = copies
    for other in others:
        first.add_(other)
    if group is not None:
        _sum_over(group, [first])
    for other in others:
        other.copy_(first)


def _sum_over(group: dist.ProcessGroup, gradients: Iterable[Tensor]) -> None:
    """One all-reduce per dtype over all `gradients`, in place."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for bucket in by_dtype.values():
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat, group=group)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))
