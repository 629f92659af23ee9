"""Global batches of eight samples with all that has broken somebody's trainer; the same wherever they are made."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatron_ross.config.model import IGNORE_LABEL, IMAGE_TOKEN_ID, RossModelConfig
from megatron_ross.data.batch import ImageSpan, RossSample

KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # name: (images of each sample, samples without supervised tokens)
    "mixed": ((1, 0, 2, 1, 1, 0, 1, 3), ()),
    "text_only_microbatches": ((0, 0, 0, 0, 1, 2, 1, 1), ()),
    "unsupervised_microbatches": ((1, 1, 1, 1, 0, 1, 2, 0), (0, 1, 2, 3, 6)),
    "no_image": ((0,) * 8, (3,)),
}

IMAGES_EVERYWHERE = "images_everywhere"
"""No text-only sample: in one microbatch, the published means are then the default ones."""


def make_batch(kind: str, model: RossModelConfig, *, truncated: bool = True) -> list[RossSample]:
    """Samples of different lengths; with `truncated`, some end right after an image or without its last image."""
    images, unsupervised = KINDS[kind] if kind != IMAGES_EVERYWHERE else ((1, 2, 1, 3, 1, 1, 2, 1), ())
    return [_sample(i, count, i not in unsupervised, truncated and i % 4 == 3, model) for i, count in enumerate(images)]


def _sample(index: int, num_images: int, supervised: bool, truncated: bool, model: RossModelConfig) -> RossSample:
    generator = torch.Generator().manual_seed(1000 + index)
    num_tokens = model.vision.num_image_tokens
    length = num_images * (num_tokens + 2) + 9 + 5 * (index % 3)
    ids = torch.randint(0, model.language.vocab_size, (length,), generator=generator)
    labels = torch.where(torch.rand(length, generator=generator) < 0.4, ids, IGNORE_LABEL)
    starts = [2 + i * (num_tokens + 2) for i in range(num_images)]
    for start in starts:
        ids[start : start + num_tokens] = IMAGE_TOKEN_ID
        labels[start : start + num_tokens] = IGNORE_LABEL
    labels[-2:] = ids[-2:]
    if not supervised:
        labels[:] = IGNORE_LABEL
    stop = starts[-1] + num_tokens if truncated and starts else length
    load = functools.partial(_pixels, index, model.vision.image_size)
    spans = tuple(ImageSpan(start, i, functools.partial(load, i)) for i, start in enumerate(starts))
    return RossSample(100 + 7 * index, ids[:stop], labels[:stop], spans)


def _pixels(index: int, size: int, number: int) -> Tensor:
    """float32 [3, P, P], some beyond the range that a real image can have."""
    generator = torch.Generator().manual_seed(index * 16 + number)
    return torch.randn(3, size, size, generator=generator) * 0.7
