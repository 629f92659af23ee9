"""Losses as sums over positions and images, and the scales that turn sums into the training loss.

Every microbatch's loss is `lm_sum * lm_scale + recon_sum * recon_scale`. The scales are known before the step starts,
so gradients are plain sums over microbatches and ranks, and nothing is rescaled afterwards, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

Observe = Callable[[Tensor], None]
"""Gets losses of single tokens, detached, and changes nothing."""

_REFERENCE_EPSILON = 1e-6  # the published code multiplies by mask.sum() / (mask.sum() + 1e-6)


@dataclass(frozen=True)
class LossScales:
    """Factors of one microbatch's summed losses."""

    lm: float
    recon: float


@dataclass(frozen=True)
class BatchCounts:
    """What a microbatch (or a global batch) holds."""

    supervised_tokens: int
    images: int  # images to reconstruct
    image_slots: int = 0  # with the dummy images of text-only samples (reference mode)


def token_mean_scales(total: BatchCounts, recon_loss_weight: float, lm_loss_weight: float = 1.0) -> LossScales:
    """Default: one global mean over supervised tokens, one over reconstructed images. Empty sets weigh nothing."""
    return LossScales(
        lm=lm_loss_weight / total.supervised_tokens if total.supervised_tokens else 0.0,
        recon=recon_loss_weight / total.images if total.images else 0.0,
    )


def reference_scales(
    micro: BatchCounts, num_microbatches: int, num_draws: int, recon_loss_weight: float, lm_loss_weight: float = 1.0
) -> LossScales:
    """As published: the mean over `num_microbatches` (of all data-parallel ranks) of each microbatch's own means.

    The reconstruction mean runs over all image slots, dummies included, times n / (n + 1e-6) with n the number of
    (draw, sample) rows that have an image.
    """
    rows = num_draws * micro.images
    recon = rows / (rows + _REFERENCE_EPSILON) / micro.image_slots if micro.image_slots else 0.0
    lm = 1.0 / micro.supervised_tokens if micro.supervised_tokens else 0.0
    return LossScales(lm=lm * lm_loss_weight / num_microbatches, recon=recon * recon_loss_weight / num_microbatches)


def lm_loss_sum(logits: Tensor, labels: Tensor, observe: Observe | None = None) -> Tensor:
    """Summed cross entropy of vocabulary-parallel logits [n, v/tp] against labels int64 [n]; fp32 scalar.

    `observe` gets the losses of the tokens, fp32 [n].
    """
    if labels.numel() == 0:
        return logits.float().sum()  # zero, and still connected to the head's weight
    losses = vocab_parallel_cross_entropy(logits.float().contiguous(), labels)
    if observe is not None:
        observe(losses.detach())
    return losses.sum()


def recon_loss_sum(squared_error: Tensor, count: Tensor, weight: Tensor) -> Tensor:
    """Sum over images of the squared noise error, averaged over draws, channels and positions; fp32 scalar.

    Args:
        squared_error: summed over channels and positions, float32 [K, n].
        count: how many elements each sum has, int64 [K, n].
        weight: float32 [n]; 0 leaves an image out.
    """
    per_image = squared_error.sum(dim=0) / count.sum(dim=0)
    return (per_image * weight).sum()
