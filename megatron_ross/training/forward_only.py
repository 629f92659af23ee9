"""Running the model between two training steps without leaving a trace in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_ross.models.ross_stage import RossStage
from megatron_ross.parallel.param_gather import gather_now


@contextlib.contextmanager
def forward_only(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Parameters are up to date; no gradients, recomputation or FP8. Entering it is a collective call.

    An FP8 run computes in bf16 here: an FP8 forward pass would write the maxima down that scale its next steps.
    """
    gather_now(chunks)
    stages: list[RossStage] = [chunk.module for chunk in chunks]
    modes = [(module, module.training) for stage in stages for module in stage.modules()]
    config = stages[0].config
    fp8 = config.fp8
    try:
        config.fp8 = None
        for stage in stages:
            stage.eval()
        with torch.no_grad():
            yield
    finally:
        config.fp8 = fp8
        for module, was_training in modes:
            module.training = was_training
        for stage in stages:
            stage.losses.take()  # no step's losses
