"""How summed losses become the training loss: default and published normalisation, by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_ross.losses import BatchCounts, recon_loss_sum, reference_scales, token_mean_scales


def test_token_mean_is_one_mean_over_the_global_batch() -> None:
    scales = token_mean_scales(BatchCounts(supervised_tokens=40, images=5), recon_loss_weight=2.0)
    assert (scales.lm, scales.recon) == (1 / 40, 2 / 5)


def test_both_losses_have_weights() -> None:
    counts = BatchCounts(supervised_tokens=40, images=5, image_slots=5)
    plain, weighted = token_mean_scales(counts, 3.0), token_mean_scales(counts, 3.0, 0.25)
    assert (weighted.lm, weighted.recon) == (plain.lm / 4, plain.recon)
    plain, weighted = reference_scales(counts, 2, 4, 3.0), reference_scales(counts, 2, 4, 3.0, 0.25)
    assert (weighted.lm, weighted.recon) == (plain.lm / 4, plain.recon)
    assert token_mean_scales(counts, 1.0, 0.0).lm == reference_scales(counts, 2, 4, 1.0, 0.0).lm == 0


def test_empty_sets_weigh_nothing() -> None:
    scales = token_mean_scales(BatchCounts(supervised_tokens=0, images=0), 1.0)
    assert (scales.lm, scales.recon) == (0.0, 0.0)
    scales = reference_scales(BatchCounts(supervised_tokens=0, images=0), 3, 4, 1.0)
    assert (scales.lm, scales.recon) == (0.0, 0.0)


def test_reference_is_the_mean_of_microbatch_means() -> None:
    """Two microbatches with 10 and 30 supervised tokens, summed losses 20 and 30: mean of 2 and 1, not 50 / 40."""
    counts = [BatchCounts(10, 2, 2), BatchCounts(30, 2, 2)]
    scales = [reference_scales(c, 2, 4, 1.0) for c in counts]
    assert sum(s.lm * total for s, total in zip(scales, (20.0, 30.0), strict=True)) == pytest.approx(1.5)


def test_reference_dilutes_by_dummy_images() -> None:
    """One image and one text-only sample: the published mean is over both, times 4 / (4 + 1e-6)."""
    scales = reference_scales(BatchCounts(5, images=1, image_slots=2), 1, 4, 1.0)
    assert scales.recon == pytest.approx(4 / (4 + 1e-6) / 2, rel=1e-12)
    only_text = reference_scales(BatchCounts(5, images=0, image_slots=2), 1, 4, 1.0)
    assert only_text.recon == 0.0


def test_reconstruction_sum_is_per_image_and_weighted() -> None:
    squared = torch.tensor([[4.0, 8.0, 100.0], [6.0, 12.0, 100.0]])  # [K=2, n=3]
    count = torch.full((2, 3), 5)
    assert recon_loss_sum(squared, count, torch.tensor([1.0, 0.5, 0.0])) == pytest.approx(1.0 + 0.5 * 2.0)
