"""One optimizer step: microbatches through Megatron's pipeline schedule, gradients finalised, parameters updated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ross.config.schema import LossConfig
from megatron_ross.data.batch import RossMicrobatch
from megatron_ross.losses import BatchCounts, LossScales, reference_scales, token_mean_scales
from megatron_ross.models.ross_stage import RossStage
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.planner.workload import Work, causal_pairs
from megatron_ross.platform import current_device
from megatron_ross.training.rerun import Rerun


@dataclass(frozen=True)
class StepResult:
    """What one step did. Losses are those of the global batch."""

    lm_loss: float
    recon_loss: float
    grad_norm: float
    updated: bool

    @property
    def loss(self) -> float:
        return self.lm_loss + self.recon_loss


def count(batch: RossMicrobatch) -> BatchCounts:
    """Supervised tokens and images of a microbatch."""
    return BatchCounts(
        supervised_tokens=batch.num_supervised_tokens,
        images=int(((batch.recon_weight > 0) & (batch.recon_start >= 0)).sum()),
        image_slots=int((batch.recon_weight > 0).sum()),
    )


def loss_scales(batches: list[RossMicrobatch], loss: LossConfig, groups: ParallelGroups) -> list[LossScales]:
    """Scales of this rank's microbatches. One all-reduce of counts over data-parallel ranks, before the step."""
    counts = [count(batch) for batch in batches]
    weights = loss.recon_loss_weight, loss.lm_loss_weight
    if loss.loss_mode == "reference":
        num_microbatches = len(batches) * groups.dp.size()
        return [reference_scales(c, num_microbatches, loss.num_noise_draws, *weights) for c in counts]
    totals = torch.tensor(
        [sum(c.supervised_tokens for c in counts), sum(c.images for c in counts)], device=current_device()
    )
    dist.all_reduce(totals, group=groups.dp)
    total = BatchCounts(*totals.tolist())
    return [token_mean_scales(total, *weights)] * len(batches)


def step_work(batches: list[RossMicrobatch], groups: ParallelGroups) -> Work:
    """What this step computes over all data-parallel ranks; for FLOPs and tokens per second. A collective call."""
    counts = [count(batch) for batch in batches]
    totals = torch.tensor(
        [
            sum(sum(batch.lengths) for batch in batches),
            causal_pairs(length for batch in batches for length in batch.lengths),
            sum(c.supervised_tokens for c in counts),
            sum(batch.num_images for batch in batches),
            sum(c.images for c in counts),
        ],
        dtype=torch.float64,
        device=current_device(),
    )
    dist.all_reduce(totals, group=groups.dp)
    return Work(*totals.tolist())


def run_schedule(
    chunks: list[DistributedDataParallel] | list[RossStage],
    batches: list[RossMicrobatch],
    scales: list[LossScales],
    *,
    forward_only: bool = False,
) -> None:
    """Forward (and backward) of all microbatches; losses and gradients accumulate in the chunks."""
    iterators = [iter(zip(batches, scales, strict=True)) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
    )


def _forward_step(iterator: Iterator[tuple[RossMicrobatch, LossScales]], chunk):
    batch, scales = next(iterator)
    output = chunk(batch, scales)

    def loss_func(loss: Tensor) -> tuple[Tensor, Tensor, dict]:
        # The token count is Megatron's divisor; ours is already inside the loss.
        return loss, torch.ones((), dtype=torch.int, device=loss.device), {}

    return output, loss_func


def local_losses(stages: list[RossStage]) -> Tensor:
    """float64 [2]: what this rank's stages summed up of the lm and recon loss."""
    return torch.stack([stage.losses.take() for stage in stages]).sum(0)


def reduce_losses(sums: Tensor, groups: ParallelGroups) -> tuple[float, float]:
    """(lm, recon) loss of the global batch, from the ranks' `local_losses`."""
    # The LM loss is the same on all tensor-parallel ranks; the reconstruction loss is shared out among them.
    sums = sums / torch.tensor([groups.tp.size(), 1], dtype=sums.dtype, device=sums.device)
    dist.all_reduce(sums)
    lm, recon = sums.tolist()
    return lm, recon


def train_step(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: list[RossMicrobatch],
    scales: list[LossScales],
    groups: ParallelGroups,
    rerun: Rerun | None = None,
) -> StepResult:
    """Forward, backward, update; a step whose loss or gradient norm is not finite updates nothing, on any rank."""
    for _ in [None] if rerun is None else rerun.attempts(chunks[0].module.breakdown):  # all chunks have the same one
        sums = _accumulate_gradients(chunks, optimizer, batches, scales)
        if rerun is not None:
            rerun.check(sums)
    lm_loss, recon_loss = reduce_losses(sums, groups)
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    finite = math.isfinite(grad_norm) and math.isfinite(lm_loss + recon_loss)
    if finite:
        _clip(optimizer, grad_norm)
        optimizer.step_with_ready_grads()
    return StepResult(lm_loss, recon_loss, grad_norm, updated=finite)


def compute_gradients(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: list[RossMicrobatch],
    scales: list[LossScales],
    groups: ParallelGroups,
) -> tuple[float, float]:
    """Losses (lm, recon) and finalised gradients of the global batch, without an update."""
    return reduce_losses(_accumulate_gradients(chunks, optimizer, batches, scales), groups)


def _accumulate_gradients(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: list[RossMicrobatch],
    scales: list[LossScales],
) -> Tensor:
    """Finalised gradients, from zero; this rank's `local_losses`."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    run_schedule(chunks, batches, scales)
    return local_losses([chunk.module for chunk in chunks])


def _clip(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    max_norm = optimizer.config.clip_grad
    if grad_norm > max_norm:
        clip_grad_by_total_norm_fp32(optimizer.get_parameters(), max_norm=max_norm, total_norm=grad_norm)
