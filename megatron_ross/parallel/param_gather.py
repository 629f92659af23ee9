"""Waiting for parameters that are still being gathered (`overlap_param_gather`).

Megatron waits for a parameter when the module that owns it is called. That misses weights which are used without such
a call (the LM head's), and modules that a rank leaves out because its microbatch has no image: other ranks would then
gather in another order. So a stage waits for these modules itself, in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.distributed import DistributedDataParallel
from torch import nn

WaitFor = Callable[[nn.Module], None]


def nothing_to_wait_for(module: nn.Module) -> None:
    """What a stage calls when parameters are not gathered behind its back."""


def gathered_parameters(chunk: DistributedDataParallel) -> WaitFor:
    """A function that waits until all trainable parameters of a module are up to date, as Megatron's own hook does."""
    bucket_group_of = chunk.param_to_bucket_group
    is_dispatched_by_schedule = chunk.ddp_config.align_param_gather

    def wait_for(module: nn.Module) -> None:
        for parameter in module.parameters():
            if parameter in bucket_group_of:
                bucket_group_of[parameter].finish_param_sync(skip_next_bucket_dispatch=is_dispatched_by_schedule)

    return wait_for


def gather_now(chunks: list[DistributedDataParallel]) -> None:
    """Make all parameters up to date between two steps, for whoever reads them then. A collective call."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
