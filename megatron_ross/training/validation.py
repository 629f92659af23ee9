"""Validation: both losses on samples that are never trained on, always the same ones with the same noise.

Losses are one global mean over supervised tokens and one over images, whatever the layout, the batch sizes or
`loss_mode`, so they can be compared between runs; each is times its weight (`lm_loss_weight`, `recon_loss_weight`), as
the training losses are. Batches go through Megatron's schedule forward only, and the training loader, its order, every
random state and all gradients stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel

from megatron_ross.config.schema import RunConfig
from megatron_ross.data.held_out import FixedOrder
from megatron_ross.data.loader import RossLoader
from megatron_ross.losses import LossScales
from megatron_ross.models.loss_breakdown import LossBreakdown, MeanLosses
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.platform import current_device
from megatron_ross.training.errors import TrainingError
from megatron_ross.training.forward_only import forward_only
from megatron_ross.training.step import run_schedule


@dataclass(frozen=True)
class ValidationResult:
    """Of one pass over the held-out samples; `bad_samples` as in training, by status."""

    losses: MeanLosses
    num_samples: int
    seconds: float
    bad_samples: dict[str, int]


class Validation:
    """Runs the held-out samples through the model.

    Args:
        loader: of `order`; it is rewound here.
        breakdown: takes the losses; one of its own, not training's.
        beat: tells the watchdog that something goes on.
    """

    def __init__(
        self,
        run: RunConfig,
        chunks: list[DistributedDataParallel],
        groups: ParallelGroups,
        loader: RossLoader,
        order: FixedOrder,
        breakdown: LossBreakdown,
        beat: Callable[[str], None],
    ) -> None:
        self._chunks, self._groups = chunks, groups
        self._loader, self._breakdown, self._beat = loader, breakdown, beat
        self._num_samples = order.num_real_samples
        # The breakdown takes unscaled losses; a weight of zero says that a loss is not worth its time.
        self._scales = LossScales(lm=run.loss.lm_loss_weight, recon=run.loss.recon_loss_weight)
        self._num_batches = order.num_sequences // run.data.global_batch_size

    def run(self, should_stop: Callable[[], bool]) -> ValidationResult | None:
        """All held-out samples. A collective call.

        Args:
            should_stop: asked before every batch, on every rank; with the same answer on all of them.

        Returns:
            None if it was stopped.
        """
        begin = time.perf_counter()
        self._loader.rewind()
        with forward_only(self._chunks):
            for number in range(self._num_batches):
                if should_stop():
                    self._loader.rewind()
                    return None
                self._beat(f"validation, batch {number + 1} of {self._num_batches}")
                self._forward()
        losses = self._breakdown.take(self._groups)
        if not losses.lm.count and not losses.recon.count:
            raise TrainingError(
                f"validation has nothing to measure: its {self._num_samples} held-out samples have no supervised token "
                f"and no image to reconstruct (by finding: {dict(self._loader.bad_sample_counts)}); check "
                "valid_data_path or valid_split"
            )
        return ValidationResult(
            losses, self._num_samples, time.perf_counter() - begin, dict(self._loader.bad_sample_counts)
        )

    def _forward(self) -> None:
        device = current_device()
        batches = [batch.to(device) for batch in self._loader.next_step()]
        stages = [chunk.module for chunk in self._chunks]
        of_training = [stage.breakdown for stage in stages]
        try:
            for stage in stages:
                stage.breakdown = self._breakdown
            run_schedule(self._chunks, batches, [self._scales] * len(batches), forward_only=True)
        finally:
            for stage, breakdown in zip(stages, of_training, strict=True):
                stage.breakdown = breakdown

    def close(self) -> None:
        """Stop the loader's threads."""
        self._loader.close()
