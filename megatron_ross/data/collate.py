"""Samples -> one microbatch: padded to a common length, or packed one after the other (THD).

Only the contiguous share of images that belongs to this tensor-parallel rank is decoded; all else is the same on every
rank of a replica, so nothing needs to be broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ross.config.model import IGNORE_LABEL, IMAGE_TOKEN_ID
from megatron_ross.data.batch import ImageSpan, RossMicrobatch, RossSample

PixelLoader = Callable[[Sequence[ImageSpan]], list[Tensor]]
"""Pixels (float32 [3, P, P]) of several images; may decode them in parallel."""


@dataclass(frozen=True)
class LatentLoader:
    """Reads VAE posterior moments, float16 of `shape` [2, C, 2g, 2g] per image; None stands for the dummy image."""

    shape: tuple[int, ...]
    load: Callable[[Sequence[ImageSpan | None]], list[Tensor]]


def load_one_by_one(spans: Sequence[ImageSpan]) -> list[Tensor]:
    """The simplest PixelLoader."""
    return [span.load_pixels() for span in spans]


def image_share(num_images: int, rank: int, size: int) -> range:
    """The images of tensor-parallel `rank`: contiguous shares of ceil(n / size); the last ones may be empty."""
    share = -(-num_images // size)
    return range(min(num_images, rank * share), min(num_images, (rank + 1) * share))


def collate(
    samples: Sequence[tuple[int, RossSample]],
    seq_length: int,
    *,
    image_size: int,
    tp_rank: int = 0,
    tp_size: int = 1,
    want_pixels: bool = True,
    reference_dummy_images: bool = False,
    load: PixelLoader = load_one_by_one,
    latents: LatentLoader | None = None,
) -> RossMicrobatch:
    """One sample per row, right-padded.

    Args:
        samples: (epoch, sample) per row.
        seq_length: s; no sample is longer.
        image_size: P.
        want_pixels: False on ranks that run neither the tower nor the VAE.
        reference_dummy_images: a text-only sample adds a dummy image (see RossMicrobatch), and of several images
            only a sample's first is reconstructed.
        latents: reads moments of this rank's share; None on ranks without the VAE's place, or if they are not cached.

    Raises:
        ValueError: a sample is longer than `seq_length`.
        ImageError: an image of this rank's share cannot be decoded.
    """
    rows = [_padded_row(sample, seq_length) for _, sample in samples]
    ids, labels = (torch.stack(tensors) for tensors in zip(*rows, strict=True))
    offsets = [row * seq_length for row in range(len(samples))]
    batch = _assemble(ids, labels, samples, offsets, reference_dummy_images)
    batch.position_ids = torch.arange(seq_length).repeat(len(samples), 1)
    share, slots = image_share(batch.num_images, tp_rank, tp_size), _image_slots(samples, reference_dummy_images)
    if want_pixels:
        batch.pixels = _load_share([slots[i] for i in share], image_size, load)
    if latents is not None:
        batch.latents = _load_latents([slots[i] for i in share], batch.recon_weight[share.start : share.stop], latents)
    return batch


def collate_packed(
    packs: Sequence[Sequence[tuple[int, RossSample]]],
    seq_length: int,
    *,
    image_size: int,
    tp_rank: int = 0,
    tp_size: int = 1,
    want_pixels: bool = True,
    reference_dummy_images: bool = False,
    load: PixelLoader = load_one_by_one,
    latents: LatentLoader | None = None,
) -> RossMicrobatch:
    """Several packs of several samples in one row (b = 1, s = len(packs) * seq_length).

    Every sample is a segment of `cu_seqlens` with position ids from 0; the padding behind a pack is a segment of its
    own, so that `cu_seqlens` always ends with s. Arguments and errors are those of `collate`.
    """
    segments: list[Tensor] = []
    labels: list[Tensor] = []
    offsets: list[int] = []
    for number, pack in enumerate(packs):
        used = sum(len(sample.input_ids) for _, sample in pack)
        if used > seq_length:
            raise ValueError(f"a pack of {used} tokens does not fit seq_length {seq_length}")
        offset = number * seq_length
        for _, sample in pack:
            offsets.append(offset)
            segments.append(sample.input_ids)
            labels.append(_shift(sample.labels))
            offset += len(sample.input_ids)
        if used < seq_length:
            segments.append(torch.zeros(seq_length - used, dtype=torch.int64))
            labels.append(torch.full((seq_length - used,), IGNORE_LABEL))
    samples = [pair for pack in packs for pair in pack]
    lengths = torch.tensor([len(segment) for segment in segments])
    batch = _assemble(torch.cat(segments)[None], torch.cat(labels)[None], samples, offsets, reference_dummy_images)
    batch.position_ids = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    batch.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    batch.max_seqlen = int(lengths.max())
    share, slots = image_share(batch.num_images, tp_rank, tp_size), _image_slots(samples, reference_dummy_images)
    if want_pixels:
        batch.pixels = _load_share([slots[i] for i in share], image_size, load)
    if latents is not None:
        batch.latents = _load_latents([slots[i] for i in share], batch.recon_weight[share.start : share.stop], latents)
    return batch


def _shift(labels: Tensor) -> Tensor:
    """[s]: the target of position i is the label of i + 1."""
    return torch.cat([labels[1:], torch.full((1,), IGNORE_LABEL)])


def _padded_row(sample: RossSample, seq_length: int) -> tuple[Tensor, Tensor]:
    padding = seq_length - len(sample.input_ids)
    if padding < 0:
        raise ValueError(
            f"sample {sample.sample_id} has {len(sample.input_ids)} tokens, more than seq_length {seq_length}"
        )
    ids = torch.nn.functional.pad(sample.input_ids, (0, padding))
    return ids, torch.nn.functional.pad(_shift(sample.labels), (0, padding), value=IGNORE_LABEL)


def _assemble(
    ids: Tensor, labels: Tensor, samples: Sequence[tuple[int, RossSample]], offsets: Sequence[int], dummies: bool
) -> RossMicrobatch:
    """Everything but position ids, pixels and cu_seqlens. `offsets`: flat position of each sample's first token."""
    starts: list[int] = []
    weights: list[float] = []
    keys: list[tuple[int, int, int]] = []
    for (epoch, sample), offset in zip(samples, offsets, strict=True):
        for span in sample.images:
            starts.append(offset + span.start)
            weights.append(float(span.reconstruct and not (dummies and span.index > 0)))
            keys.append((epoch, sample.sample_id, span.index))
        if dummies and not sample.images:
            starts.append(-1)
            weights.append(1.0)
            keys.append((epoch, sample.sample_id, 0))
    image_mask = ids == IMAGE_TOKEN_ID
    return RossMicrobatch(
        tokens=ids.masked_fill(image_mask, 0),
        labels=labels,
        position_ids=torch.empty(0, dtype=torch.int64),
        image_mask=image_mask,
        num_images=len(starts),
        recon_start=torch.tensor(starts, dtype=torch.int64),
        recon_weight=torch.tensor(weights, dtype=torch.float32),
        noise_keys=torch.tensor(keys, dtype=torch.int64).reshape(-1, 3),
        lengths=[len(sample.input_ids) for _, sample in samples],
        sample_ids=[sample.sample_id for _, sample in samples],
        sample_spans=torch.tensor([list(offsets), [sample.sample_id for _, sample in samples]], dtype=torch.int64),
    )


def _image_slots(samples: Sequence[tuple[int, RossSample]], dummies: bool) -> list[ImageSpan | None]:
    """Images in the order of a microbatch; None is a dummy image."""
    slots: list[ImageSpan | None] = []
    for _, sample in samples:
        slots += sample.images or ([None] if dummies else [])
    return slots


def _load_share(slots: Sequence[ImageSpan | None], image_size: int, load: PixelLoader) -> Tensor:
    """float32 [n_share, 3, P, P]; dummy images stay zero."""
    real = [(i, span) for i, span in enumerate(slots) if span is not None]
    loaded = load([span for _, span in real])
    if loaded and len(loaded) == len(slots):
        return torch.stack(loaded)
    device = loaded[0].device if loaded else None  # a decoder may leave pixels on the GPU
    pixels = torch.zeros(len(slots), 3, image_size, image_size, device=device)
    for (i, _), image in zip(real, loaded, strict=True):
        pixels[i] = image
    return pixels


def _load_latents(slots: Sequence[ImageSpan | None], weights: Tensor, latents: LatentLoader) -> Tensor:
    """float16 [n_share, 2, C, 2g, 2g]; images that are not reconstructed stay zero."""
    wanted = (weights > 0).nonzero().flatten().tolist()
    moments = torch.zeros(len(slots), *latents.shape, dtype=torch.float16)
    for i, loaded in zip(wanted, latents.load([slots[i] for i in wanted]), strict=True):
        moments[i] = loaded
    return moments
