"""What has to be computed: counts of tokens, attended pairs and images. Planned from means, measured from batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig


def causal_pairs(lengths: Iterable[int]) -> int:
    """(query, key) pairs that causal attention computes in sequences of these lengths; packed samples count alone."""
    return sum(length * (length + 1) // 2 for length in lengths)


@dataclass(frozen=True)
class Work:
    """Counts of a microbatch, a step, or any other set of samples."""

    tokens: float
    """Real tokens, images expanded, padding left out."""
    attention_pairs: float
    supervised_tokens: float
    images: float
    reconstructed_images: float

    def __mul__(self, times: float) -> Work:
        return Work(*(times * count for count in vars(self).values()))


@dataclass(frozen=True)
class Workload:
    """Means over a data set, per sample."""

    text_tokens: float
    supervised_tokens: float
    images: float = 1.0
    padding: float = 1.0
    """Computed tokens per real token: 1 when samples are packed, else sequences are as long as the step's longest."""

    def samples_per_sequence(self, model: RossModelConfig, run: RunConfig) -> float:
        """Samples in one sequence of a batch: one, or as many as a packed sequence holds."""
        if not run.data.packing:
            return 1.0
        return max(1.0, run.data.seq_length / self.work(model, run.data.seq_length).tokens)

    def work(self, model: RossModelConfig, seq_length: int, num_samples: float = 1.0) -> Work:
        """Counts of `num_samples` samples; an image adds its tokens, and `seq_length` cuts what is longer."""
        tokens = min(self.text_tokens + self.images * model.vision.num_image_tokens, seq_length)
        return (
            Work(
                tokens=tokens,
                attention_pairs=tokens * (tokens + 1) / 2,
                supervised_tokens=min(self.supervised_tokens, tokens),
                images=self.images,
                reconstructed_images=self.images if model.denoiser is not None else 0.0,
            )
            * num_samples
        )


CAPTIONS = Workload(text_tokens=25, supervised_tokens=24, padding=1.05)
"""Stage 1, template `plain`: short captions. An assumption; give the means of your data for better plans."""
CONVERSATIONS = Workload(text_tokens=171, supervised_tokens=170, padding=1.5)
"""Stage 2, about 900 tokens a sample with 729 image tokens; a step is as long as its longest. An assumption, too."""


def default_workload(run: RunConfig) -> Workload:
    """Assumed means for the run's template; packed samples need no padding."""
    workload = CAPTIONS if run.data.template == "plain" else CONVERSATIONS
    return replace(workload, padding=1.0) if run.data.packing else workload


def images_on_busiest_rank(images: float, tensor_model_parallel_size: int) -> float:
    """Images a tensor-parallel rank encodes. Whole images are shared out: a single one keeps a single rank busy."""
    return images if images < 1 else float(math.ceil(images / tensor_model_parallel_size))
