"""Both losses of many microbatches as means that can be taken apart: by timestep of the denoiser, by source of a blend.

Ranks add up (sum, count) pairs on their device, without waiting for it; one reduction of one small tensor makes means.
What is added is unscaled and detached, so looking at a run does not change it.

Shape legend: K draws per image, n images, m tokens, B timestep buckets, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ross.data.batch import RossMicrobatch, samples_at
from megatron_ross.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class Mean:
    """`value` is 0 where nothing was counted, as a step's losses are."""

    total: float
    count: int

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True)
class MeanLosses:
    """Over all ranks: per supervised token, per reconstructed image.

    `by_timestep` has a mean over (draw, image) rows for each of B equal ranges of timesteps, least noise first.
    """

    lm: Mean
    recon: Mean
    by_timestep: list[Mean] = field(default_factory=list)
    lm_by_source: list[Mean] = field(default_factory=list)
    recon_by_source: list[Mean] = field(default_factory=list)


class LossBreakdown:
    """What the stages of one rank have added since the last `take`.

    Args:
        num_buckets: B; 0 does not look at timesteps.
        source_ends: one past the last sample id of each source; empty does not look at sources.
    """

    def __init__(self, device: torch.device, *, num_buckets: int = 0, source_ends: Sequence[int] = ()) -> None:
        self.num_buckets = num_buckets
        self._source_ends = torch.tensor(source_ends, dtype=torch.int64, device=device)
        self._buckets = torch.arange(num_buckets, device=device)
        self._sources = torch.arange(len(source_ends), device=device)
        # [sum and count, (lm, S times lm, recon, B buckets, S times recon)]
        self.sums = torch.zeros(2, 2 + num_buckets + 2 * len(source_ends), dtype=torch.float64, device=device)

    def add_lm(self, losses: Tensor, batch: RossMicrobatch, positions: Tensor) -> None:
        """Losses of tokens, float [m], at flat positions int64 [m] of a microbatch."""
        values = torch.stack([losses.double(), torch.ones_like(losses, dtype=torch.float64)])
        self._lm[:, 0] += values.sum(1)
        if len(self._sources):
            self._lm[:, 1:] += values @ self._source_of(samples_at(batch, positions))

    def add_recon(
        self, squared_error: Tensor, count: Tensor, t: Tensor, batch: RossMicrobatch, images: Tensor, num_timesteps: int
    ) -> None:
        """Reconstructed images of a microbatch; dummy images do not count.

        Args:
            squared_error: summed over elements, float [K, n]. count: elements in each sum, int64 [K, n].
            t: timesteps, int64 [K, n].
            images: which images of the microbatch, int64 [n].
        """
        is_real = (batch.recon_start[images] >= 0).double()
        rows = squared_error.detach().double() / count * is_real
        weight = batch.recon_weight[images].double()
        values = torch.stack([rows.mean(0) * weight, is_real])
        self._recon[:, 0] += values.sum(1)
        if self.num_buckets:
            in_bucket = (t.flatten()[:, None] * self.num_buckets // num_timesteps == self._buckets).double()
            both = torch.stack([rows.flatten(), is_real.expand_as(rows).flatten()])
            self._recon[:, 1 : 1 + self.num_buckets] += both @ in_bucket
        if len(self._sources):
            self._recon[:, 1 + self.num_buckets :] += values @ self._source_of(batch.noise_keys[images, 1])

    def take(self, groups: ParallelGroups) -> MeanLosses:
        """Means over all ranks since the last call. A collective call; resets."""
        sums = self.sums.clone()
        self.sums.zero_()
        # The LM loss is the same on all tensor-parallel ranks; the reconstruction loss is shared out among them.
        self._lm_part(sums).div_(groups.tp.size())
        dist.all_reduce(sums)
        return self.means(sums)

    def means(self, sums: Tensor) -> MeanLosses:
        """Of sums and counts laid out as `sums` has them."""
        means = [Mean(total, round(count)) for total, count in sums.t().tolist()]
        num_sources, first = len(self._sources), 1 + len(self._sources)
        return MeanLosses(
            lm=means[0],
            recon=means[first],
            by_timestep=means[first + 1 : first + 1 + self.num_buckets],
            lm_by_source=means[1:first],
            recon_by_source=means[first + 1 + self.num_buckets :] if num_sources else [],
        )

    @property
    def _lm(self) -> Tensor:
        return self._lm_part(self.sums)

    @property
    def _recon(self) -> Tensor:
        return self.sums[:, 1 + len(self._sources) :]

    def _lm_part(self, sums: Tensor) -> Tensor:
        return sums[:, : 1 + len(self._sources)]

    def _source_of(self, sample_ids: Tensor) -> Tensor:
        """One-hot float64 [n, S]. Sums are products with it: unlike scattered additions, in one order on every run."""
        source = torch.searchsorted(self._source_ends, sample_ids.contiguous(), right=True)
        return (source[:, None] == self._sources).double()
