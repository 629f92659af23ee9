"""Gradient finalisation: what has to be reduced after the last backward pass of a step.

data parallel      Megatron's DDP buffers (sum; losses are already normalised globally)
tensor parallel    sum for modules that share work (tower, projector, denoiser), and norms under sequence parallelism
tied embeddings    sum between the stages that hold E and H
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
    if groups.tied is not None:
        tied = [p for p in parameters if getattr(p, "shared_embedding", False)]
        _sum_over(groups.tied, (p.main_grad for p in tied))


def _is_partial(parameter: nn.Parameter) -> bool:
    return getattr(parameter, _SHARED_WORK, False) or getattr(parameter, "sequence_parallel", False)


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
