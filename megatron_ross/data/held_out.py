"""Samples that a run never trains on, and the fixed batches in which it looks at them again and again.

Which samples are held out depends on nothing but their place in their source and on the share that is asked for: runs
with other seeds, orders and layouts hold out the same ones, and their validation losses can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ross.data.order import SampleKey, SampleOrder, hashed_permutation
from megatron_ross.data.packing import PackedOrder

VALIDATION_EPOCH = 2**22
"""Part of every noise key of validation: always the same draws, and none that training uses before its 4th million
epoch. Times the images of a sample (256) it still fits 31 bits."""

NO_SAMPLE = -1
"""The id that fills up the last batch; the loader makes a sample of it that has no image and nothing supervised."""

_PLACE = 0x48454C44  # "HELD": sets the choice apart from every training order


def held_out_ids(num_samples: int, share: float) -> np.ndarray:
    """int64 [m], ascending: `share` of the samples of one source, rounded, and at least one of two or more.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if not share:
        return np.empty(0, dtype=np.int64)
    count = max(1, round(share * num_samples))
    if count >= num_samples:
        raise ValueError(
            f"valid_split={share}: holds out {count} of {num_samples} sample(s), and nothing is left to train on; "
            "lower it, or name other data with valid_data_path"
        )
    return np.sort(hashed_permutation(num_samples, _PLACE, 0)[:count])


def kept_ids(num_samples: int, held_out: np.ndarray) -> np.ndarray:
    """int64, ascending: all other samples of the source."""
    return np.setdiff1d(np.arange(num_samples, dtype=np.int64), held_out, assume_unique=True)


class FixedOrder(SampleOrder):
    """A list of sequences, each sample in one of them, with an end. Use a loader's `num_sequences` to stop there.

    Attributes:
        num_sequences: a multiple of the global batch size; the last ones may hold nothing but NO_SAMPLE.
        num_real_samples: without those.
    """

    def __init__(self, num_samples: int, sequences: Sequence[tuple[SampleKey, ...]]):
        super().__init__(num_samples)
        self._sequences = list(sequences)
        self.num_sequences = len(self._sequences)
        self.num_real_samples = sum(sample_id != NO_SAMPLE for keys in self._sequences for _, sample_id in keys)

    def sequences(self, start: int, stop: int) -> list[tuple[SampleKey, ...]]:
        return self._sequences[start:stop]

    def keys(self, start: int, stop: int) -> np.ndarray:
        flat = [key for sequence in self._sequences[start:stop] for key in sequence]
        return np.array(flat, dtype=np.int64).reshape(-1, 2)

    def epoch_length(self, epoch: int) -> int:
        return self.num_sequences

    def _make_epoch(self, epoch: int) -> np.ndarray:
        return self.keys(0, self.num_sequences)


class FixedPackedOrder(FixedOrder):
    """The same for packs of `capacity` tokens."""

    def __init__(self, num_samples: int, sequences: Sequence[tuple[SampleKey, ...]], capacity: int):
        super().__init__(num_samples, sequences)
        self.capacity = capacity


def validation_order(base: SampleOrder, global_batch_size: int, num_batches: int | None) -> FixedOrder:
    """The first epoch of `base` with the keys of validation, in whole global batches.

    Args:
        base: which samples, in which order, perhaps packed.
        num_batches: at most so many; None takes the whole epoch.
    """
    count = base.epoch_length(0)
    if num_batches is not None:
        count = min(count, num_batches * global_batch_size)
    sequences = [
        tuple((VALIDATION_EPOCH, sample_id) for _, sample_id in sequence) for sequence in base.sequences(0, count)
    ]
    sequences += [((VALIDATION_EPOCH, NO_SAMPLE),)] * (-count % global_batch_size)
    if isinstance(base, PackedOrder):
        return FixedPackedOrder(base.num_samples, sequences, base.capacity)
    return FixedOrder(base.num_samples, sequences)
