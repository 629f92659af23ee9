"""Synthetic samples with the lengths of real ones, packed into steps as training packs them."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from step_sizes import StepSize, Texts
from torch import Tensor

from megatron_ross.config.model import IGNORE_LABEL, IMAGE_TOKEN_ID, RossModelConfig
from megatron_ross.data.batch import ImageSpan, RossSample
from megatron_ross.data.packing import plan_packs

LOOKAHEAD = 64
TOKENS_BEFORE_IMAGE = 1

Pack = list[tuple[int, RossSample]]
"""(epoch, sample) of one packed sequence."""


def plan_steps(size: StepSize, seq_length: int, texts: Texts, num_steps: int, seed: int) -> list[list[Pack]]:
    """Packs of each step: full ones, from the middle of a stream as training sees it."""
    samples_per_pack = seq_length / size.model.vision.num_image_tokens
    count = LOOKAHEAD + math.ceil(2 * num_steps * size.sequences * samples_per_pack)
    samples = make_samples(size, texts, count, seed)
    keys = np.array([(0, sample.sample_id) for sample in samples], dtype=np.int64)
    lengths = np.array([len(sample.input_ids) for sample in samples])
    plan = plan_packs(keys, lengths, seq_length, LOOKAHEAD)
    packs = [
        [(0, samples[i]) for i in plan.keys[start:end, 1]]
        for start, end in zip(plan.bounds[:-1], plan.bounds[1:], strict=True)
    ]
    return [packs[i * size.sequences : (i + 1) * size.sequences] for i in range(num_steps)]


def make_samples(size: StepSize, texts: Texts, count: int, seed: int) -> list[RossSample]:
    """`count` samples; the mean of the log-normal lengths is `texts.mean`, before they are cut at `size.max_text`."""
    rng = np.random.default_rng(seed)
    location = math.log(texts.mean) - texts.sigma**2 / 2
    lengths = np.clip(rng.lognormal(location, texts.sigma, count).round(), 8, size.max_text).astype(int)
    # Every tenth sample, not one in ten by chance: steps are few.
    every = round(1 / texts.text_only) if texts.text_only else count + 1
    return [
        _sample(i, int(length), (i + 1) % every != 0, texts.supervised, size.model, seed)
        for i, length in enumerate(lengths)
    ]


def _sample(
    index: int, num_text: int, has_image: bool, supervised: float, model: RossModelConfig, seed: int
) -> RossSample:
    generator = torch.Generator().manual_seed(seed * 100_003 + index)
    num_image = model.vision.num_image_tokens if has_image else 0
    ids = torch.randint(0, model.language.vocab_size, (num_text + num_image,), generator=generator)
    labels = ids.clone()
    labels[: len(ids) - max(1, round(supervised * num_text))] = IGNORE_LABEL
    if not has_image:
        return RossSample(index, ids, labels)
    start = TOKENS_BEFORE_IMAGE
    ids[start : start + num_image] = IMAGE_TOKEN_ID
    labels[: start + num_image] = IGNORE_LABEL
    load = functools.partial(_pixels, seed, index, model.vision.image_size)
    return RossSample(index, ids, labels, (ImageSpan(start, 0, load, name=str(index)),))


def _pixels(seed: int, index: int, side: int) -> Tensor:
    """float32 [3, P, P]: smooth noise in the range of normalised pixels."""
    generator = torch.Generator().manual_seed(seed * 100_003 + index)
    coarse = torch.rand(1, 3, side // 8, side // 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")[0]
