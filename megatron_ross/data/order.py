"""The order in which samples are consumed: one endless sequence per seed, the same for every layout and worker count.

Epoch e is a permutation of all samples that depends on (seed, e) only. A global batch is the next slice of that
sequence, so the number of consumed sequences is all a resume needs. The shuffle is an argsort of hashed indices, so
that it does not change with the version of any library.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

SampleKey = tuple[int, int]
"""(epoch, sample id)."""


class SampleOrder:
    """Every sample once per epoch, shuffled (or in file order). Subclasses order them otherwise."""

    def __init__(self, num_samples: int, seed: int = 0, *, shuffle: bool = True, ids: np.ndarray | None = None):
        """
        Args:
            num_samples: of the data set.
            ids: the samples that an epoch consists of, int64 [m]; None takes all.

        Raises:
            ValueError: there is no sample.
        """
        self.num_samples = num_samples
        self.num_kept = num_samples if ids is None else len(ids)
        if self.num_kept < 1:
            raise ValueError(f"an order needs at least one sample, got {self.num_kept}")
        self._ids = ids
        self.seed = seed
        self.shuffle = shuffle
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._starts = [0]
        self._lock = threading.RLock()  # a loader's background threads and its caller ask at the same time

    def epoch_keys(self, epoch: int) -> np.ndarray:
        """int64 [m, 2]: (epoch, sample id) of all samples of one epoch, in order."""
        with self._lock:
            if epoch not in self._cache:
                self._cache[epoch] = self._make_epoch(epoch)
                if len(self._cache) > 2:
                    self._cache.popitem(last=False)
            return self._cache[epoch]

    def epoch_ids(self, epoch: int) -> np.ndarray:
        """int64 [m]: the sample ids of one epoch, in order."""
        return self.epoch_keys(epoch)[:, 1]

    def epoch_length(self, epoch: int) -> int:
        """Number of sequences of one epoch."""
        return len(self.epoch_keys(epoch))

    def sample_at(self, global_index: int) -> SampleKey:
        """(epoch, sample id) at a place of the endless sequence of samples."""
        ((key,),) = SampleOrder.sequences(self, global_index, global_index + 1)
        return key

    def sequences(self, start: int, stop: int) -> list[tuple[SampleKey, ...]]:
        """The samples of the sequences [start, stop); here one sample makes one sequence."""
        return [((epoch, sample_id),) for epoch, sample_id in SampleOrder.keys(self, start, stop).tolist()]

    def keys(self, start: int, stop: int) -> np.ndarray:
        """int64 [m, 2]: (epoch, sample id) of every sample in the sequences [start, stop)."""
        parts = [self.epoch_keys(epoch)[begin:end] for epoch, begin, end in self._split(start, stop)]
        return np.concatenate([np.empty((0, 2), dtype=np.int64), *parts])

    def _split(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The sequences [start, stop) by epoch: (epoch, first, one past the last)."""
        while start < stop:
            with self._lock:
                while self._starts[-1] <= start:
                    self._starts.append(self._starts[-1] + self.epoch_length(len(self._starts) - 1))
            epoch = bisect.bisect_right(self._starts, start) - 1
            first, end = self._starts[epoch], min(stop, self._starts[epoch + 1])
            yield epoch, start - first, end - first
            start = end

    def _make_epoch(self, epoch: int) -> np.ndarray:
        places = (
            hashed_permutation(self.num_kept, self.seed, epoch)
            if self.shuffle
            else np.arange(self.num_kept, dtype=np.int64)
        )
        return with_epoch(places if self._ids is None else self._ids[places], epoch)


def with_epoch(ids: np.ndarray, epoch: int) -> np.ndarray:
    """int64 [n] sample ids -> int64 [n, 2] (epoch, sample id)."""
    return np.stack([np.full_like(ids, epoch), ids], axis=1)


class GroupedOrder(SampleOrder):
    """The published order (`group_by_modality_length`): batches of one kind (image, text), of similar length."""

    def __init__(
        self,
        modality_lengths: Sequence[int] | np.ndarray,
        seed: int = 0,
        *,
        batch_size: int,
        world_size: int,
        base: SampleOrder | None = None,
    ):
        """
        Args:
            modality_lengths: approximate length of every sample, negative for text-only ones, never 0.
            batch_size: samples per device and micro-batch of the run that is imitated.
            world_size: its devices times gradient accumulation steps; part of the order, not of this run's layout.
            base: which samples an epoch has (a `BlendedOrder`); None takes each once.
        """
        super().__init__(len(modality_lengths), seed)
        self._lengths = np.asarray(modality_lengths, dtype=np.int64)
        self._base = base or SampleOrder(len(modality_lengths), seed, shuffle=False)
        self._batch_size = batch_size
        self._world_size = world_size

    def _make_epoch(self, epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(_torch_seed(self.seed, epoch))
        keys = self._base.epoch_keys(epoch)
        places = grouped_indices(self._lengths[keys[:, 1]].tolist(), self._batch_size, self._world_size, generator)
        return keys[places]


def _torch_seed(seed: int, epoch: int) -> int:
    """63 bits that depend on all bits of both; the lower 32 of a seed alone decide where it has no others."""
    low, high = seed % 2**32, seed // 2**32
    mixed = _mix(np.array([low * 2**32 + epoch], dtype=np.uint64))
    if high:
        mixed = _mix(mixed ^ _mix(np.array([high], dtype=np.uint64)))
    return int(mixed[0] >> np.uint64(1))


class BlendedOrder(SampleOrder):
    """Several sources of one `dataset.ConcatDataset`, each passed `epochs[i]` times per epoch of the blend, shuffled.

    A source's passes go on from one epoch of the blend to the next, so 0.5 epochs show every sample once in two epochs
    of the blend. The epoch of a key counts the source's own passes: a sample seen twice gets two different noise draws.
    """

    def __init__(
        self,
        num_samples: Sequence[int],
        epochs: Sequence[float],
        seed: int = 0,
        *,
        ids: Sequence[np.ndarray] | None = None,
    ):
        """
        Args:
            num_samples: of each source.
            epochs: of each source in an epoch of the blend.
            ids: the samples of each source that its epoch consists of, counted within it; None takes all.

        Raises:
            ValueError: no or unequal numbers of sources and epochs, a negative number, or nothing to show.
        """
        super().__init__(sum(num_samples), seed)
        if len(num_samples) != len(epochs) or min(epochs, default=-1) < 0:
            raise ValueError(f"a blend needs one number of epochs (>= 0) per source; got {list(epochs)}")
        self._offsets = np.cumsum([0, *num_samples])
        kept = [None] * len(num_samples) if ids is None else ids
        self._sources = [
            SampleOrder(n, seed + i, ids=part) for i, (n, part) in enumerate(zip(num_samples, kept, strict=True))
        ]
        self._epochs = list(epochs)
        if not sum(_whole(e * source.num_kept) for e, source in zip(epochs, self._sources, strict=True)):
            raise ValueError(f"the blend is empty: epochs {list(epochs)} of sources of {list(num_samples)} samples")

    def _make_epoch(self, epoch: int) -> np.ndarray:
        parts = []
        for source, passes, offset in zip(self._sources, self._epochs, self._offsets[:-1], strict=True):
            share = passes * source.num_kept
            keys = source.keys(_whole(epoch * share), _whole((epoch + 1) * share))
            parts.append(keys + np.array([0, offset]))
        joined = np.concatenate(parts)
        return joined[hashed_permutation(len(joined), self.seed, epoch)]


def _whole(number: float) -> int:
    """Rounded down, but 3 * (1 / 3 - rounding error) is 1."""
    return math.floor(number + 1e-6)


def epochs_from_weights(num_samples: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Epochs per source, so that sources are sampled by weight and an epoch of the blend is as long as all of them."""
    total = sum(weights)
    if total <= 0 or min(weights) < 0:
        raise ValueError(f"weights must be >= 0 and not all 0; got {list(weights)}")
    return [w / total * sum(num_samples) / n for w, n in zip(weights, num_samples, strict=True)]


def hashed_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n]: a permutation of range(n) that depends on (seed, epoch) only, on every machine and version."""
    stream = _mix(_mix(np.array([seed], dtype=np.int64)) + np.uint64(epoch))
    return np.argsort(_mix(stream ^ _mix(np.arange(n, dtype=np.int64))), kind="stable").astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser (Steele et al., 2014): a bijection of 64-bit integers that looks random."""
    x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def grouped_indices(
    modality_lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """Index order of the published length- and modality-grouped sampler.

    Samples with images and without are grouped separately into megabatches of world_size * batch_size; full megabatches
    are shuffled, the last (possibly short) ones of both kinds are merged at the end.

    Raises:
        ValueError: a length is 0.
    """
    if 0 in modality_lengths:
        raise ValueError(f"sample {list(modality_lengths).index(0)} has length 0; the grouped order needs a sign")
    kinds = [[i for i, n in enumerate(modality_lengths) if (n > 0) == has_image] for has_image in (True, False)]
    size = world_size * batch_size
    full: list[list[int]] = []
    rest: list[int] = []
    for ids in kinds:
        if len(ids) == len(modality_lengths):  # one kind only: published code keeps the sign, nothing is shuffled again
            return _length_grouped(modality_lengths, size, world_size, generator)
        if not ids:
            continue
        lengths = [abs(modality_lengths[i]) for i in ids]
        shuffled = [ids[i] for i in _length_grouped(lengths, size, world_size, generator)]
        batches = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
        full += batches[:-1]
        rest += batches[-1]
    shuffled_batches = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
    return [i for batch in [*shuffled_batches, sorted(rest)] for i in batch]


def _length_grouped(lengths: Sequence[int], size: int, world_size: int, generator: torch.Generator) -> list[int]:
    """Shuffle, cut into megabatches, and give every device of a megabatch about the same total length."""
    indices = torch.randperm(len(lengths), generator=generator).tolist()
    result: list[int] = []
    for begin in range(0, len(indices), size):
        longest_first = sorted(indices[begin : begin + size], key=lambda i: lengths[i], reverse=True)
        for chunk in _even_chunks(longest_first, lengths, world_size):
            result += chunk
    return result


def _even_chunks(indices: list[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Deal indices to the chunk with the least total length that is not full; round-robin if they do not divide."""
    if len(indices) % num_chunks:
        return [indices[i::num_chunks] for i in range(num_chunks)]
    capacity = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0.0] * num_chunks
    for index in indices:
        target = totals.index(min(totals))
        chunks[target].append(index)
        totals[target] += lengths[index]
        if len(chunks[target]) == capacity:
            totals[target] = float("inf")
    return chunks
