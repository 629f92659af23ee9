"""Losses taken apart: every part is what a plain loop adds up, and the parts are the whole."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ross.data.batch import RossMicrobatch
from megatron_ross.models.loss_breakdown import LossBreakdown

K, TIMESTEPS, BUCKETS = 4, 1000, 7
ENDS = (3, 3, 10)
"""Of three sources: sample ids 0-2, none, 3-9."""
SAMPLE_IDS = [7, 0, 2, 9, 3]
STARTS = [0, 10, 20, 30, 40]
IMAGE_SAMPLES = [7, 7, 2, 3, 9]
"""Two images in sample 7; that of sample 3 is a dummy."""


def microbatch() -> RossMicrobatch:
    tokens = torch.zeros(1, 50, dtype=torch.int64)
    return RossMicrobatch(
        tokens=tokens,
        labels=tokens - 100,
        position_ids=tokens,
        image_mask=tokens.bool(),
        num_images=len(IMAGE_SAMPLES),
        recon_start=torch.tensor([0, 4, 20, -1, 30]),
        recon_weight=torch.ones(len(IMAGE_SAMPLES)),
        noise_keys=torch.tensor([[0, sample, 0] for sample in IMAGE_SAMPLES]),
        sample_ids=SAMPLE_IDS,
        sample_spans=torch.tensor([STARTS, SAMPLE_IDS]),
    )


def draws() -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors, counts and timesteps [K, n], the edges of buckets among them."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(0, TIMESTEPS, (K, len(IMAGE_SAMPLES)), generator=generator)
    t[0] = torch.tensor([0, 142, 143, 999, 857])
    return torch.rand(K, len(IMAGE_SAMPLES), generator=generator) * 90, torch.full_like(t, 64), t


def test_reconstruction_by_timestep_and_by_source() -> None:
    breakdown, batch = LossBreakdown(torch.device("cpu"), num_buckets=BUCKETS, source_ends=ENDS), microbatch()
    error, count, t = draws()
    images = torch.arange(len(IMAGE_SAMPLES))
    for part in images.split(2):  # as ranks and microbatches come
        breakdown.add_recon(error[:, part], count[:, part], t[:, part], batch, part, TIMESTEPS)
    got = breakdown.means(breakdown.sums)
    real = [0, 1, 2, 4]
    per_row = (error / count).double()
    assert got.recon.count == len(real)
    torch.testing.assert_close(got.recon.total, float(per_row[:, real].mean(0).sum()))
    for bucket, mean in enumerate(got.by_timestep):
        rows = [float(per_row[k, i]) for k in range(K) for i in real if int(t[k, i]) * BUCKETS // TIMESTEPS == bucket]
        assert mean.count == len(rows)
        torch.testing.assert_close(mean.total, float(sum(rows)))
    assert sum(mean.count for mean in got.by_timestep) == K * got.recon.count
    torch.testing.assert_close(sum(mean.total for mean in got.by_timestep), K * got.recon.total)
    assert [mean.count for mean in got.recon_by_source] == [1, 0, 3]
    torch.testing.assert_close(sum(mean.total for mean in got.recon_by_source), got.recon.total)
    torch.testing.assert_close(got.recon_by_source[0].total, float(per_row[:, 2].mean()))
    assert got.recon_by_source[1].value == 0.0


def test_tokens_by_source() -> None:
    breakdown, batch = LossBreakdown(torch.device("cpu"), source_ends=ENDS), microbatch()
    positions = torch.tensor([0, 9, 10, 29, 30, 49])  # of samples 7, 7, 0, 2, 9, 3
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    breakdown.add_lm(losses[:3], batch, positions[:3])
    breakdown.add_lm(losses[3:], batch, positions[3:])
    got = breakdown.means(breakdown.sums)
    assert (got.lm.total, got.lm.count) == (63.0, 6)
    assert [(mean.total, mean.count) for mean in got.lm_by_source] == [(12.0, 2), (0.0, 0), (51.0, 4)]
    assert got.by_timestep == []


def test_nothing_is_nothing() -> None:
    got = LossBreakdown(torch.device("cpu")).means(LossBreakdown(torch.device("cpu")).sums)
    assert got.lm.value == got.recon.value == 0.0
    assert got.lm_by_source == got.recon_by_source == got.by_timestep == []
