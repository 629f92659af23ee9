"""Packing: which samples share a sequence of fixed length, and the order of these sequences.

An epoch's packs are planned at once, from the lengths of its samples in their shuffled order: best fit with a
look-ahead buffer. The plan depends on (seed, epoch, lengths, capacity, look-ahead) only, so every rank makes the same
one, resuming needs the number of consumed packs only, and every sample of an epoch is in exactly one pack of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ross.data.order import SampleKey, SampleOrder


@dataclass(frozen=True)
class PackPlan:
    """`keys` int64 [n, 2], (epoch, sample id) in packed order; pack i holds keys[bounds[i]:bounds[i + 1]]."""

    keys: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1


def plan_packs(keys: np.ndarray, lengths: np.ndarray, capacity: int, lookahead: int) -> PackPlan:
    """Best fit with look-ahead: each pack is the fullest subset of the buffer that holds the buffer's oldest sample.

    Opening with the oldest sample bounds how long any sample waits.

    Args:
        keys: int64 [n, 2], (epoch, sample id) in order.
        lengths: int [n], tokens of each of them.
        lookahead: samples in the buffer.

    Raises:
        ValueError: a sample is longer than `capacity`, or has no token.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(
            f"samples have {int(lengths.min())} to {int(lengths.max())} tokens; packs of {capacity} hold 1 to "
            f"{capacity}: both are seq_length, which the lengths were measured for"
        )
    sizes = lengths.tolist()
    buffer = list(range(min(lookahead, len(sizes))))  # places in `keys`, oldest first
    entering = len(buffer)
    packed: list[int] = []
    bounds = [0]
    while buffer:
        chosen = [0, *fullest_subset([sizes[i] for i in buffer[1:]], capacity - sizes[buffer[0]])]
        packed += [buffer[i] for i in chosen]
        bounds.append(len(packed))
        for i in reversed(chosen):
            del buffer[i]
        leaving = min(len(chosen), len(sizes) - entering)
        buffer += range(entering, entering + leaving)
        entering += leaving
    return PackPlan(keys[packed], np.array(bounds, dtype=np.int64))


def fullest_subset(sizes: Sequence[int], room: int) -> list[int]:
    """1-based positions, ascending, of a subset with the largest sum <= `room`; among equals, of early positions.

    Subset sums as bits of Python integers: bit s of `reachable[i]` says that the first i sizes have a subset of sum s.
    """
    mask = (1 << (room + 1)) - 1
    reachable = [1]
    for size in sizes:
        if reachable[-1] >> room:
            break
        reachable.append((reachable[-1] | reachable[-1] << size) & mask)
    total = reachable[-1].bit_length() - 1
    chosen = []
    for i in range(len(reachable) - 1, 0, -1):
        if not reachable[i - 1] >> total & 1:
            chosen.append(i)
            total -= sizes[i - 1]
    return chosen[::-1]


def utilisation(plan: PackPlan, length_of: np.ndarray, capacity: int) -> float:
    """Share of the packs' positions that hold a token. `length_of`: tokens by sample id."""
    return float(length_of[plan.keys[:, 1]].sum()) / (capacity * max(1, len(plan)))


class PackedOrder(SampleOrder):
    """Sequences of several samples each. Epochs may differ in their number of packs."""

    def __init__(self, base: SampleOrder, lengths: Sequence[int] | np.ndarray, capacity: int, lookahead: int = 64):
        """
        Args:
            base: the order in which samples enter the look-ahead buffer.
            lengths: tokens of every sample, by sample id (`lengths.token_lengths`).
            capacity: T, tokens per sequence.

        Raises:
            ValueError: `lengths` is not one per sample, or a sample does not fit.
        """
        super().__init__(base.num_samples, base.seed)
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if self._lengths.shape != (base.num_samples,):
            raise ValueError(f"{self._lengths.size} lengths for {base.num_samples} samples")
        if lookahead < 1:
            raise ValueError(f"lookahead must be at least 1, got {lookahead}")
        self._base = base
        self.capacity = capacity
        self._lookahead = lookahead
        self._plans: dict[int, PackPlan] = {}

    def plan(self, epoch: int) -> PackPlan:
        """The packs of one epoch; the last two plans are kept."""
        with self._lock:
            if epoch not in self._plans:
                keys = self._base.epoch_keys(epoch)
                plan = plan_packs(keys, self._lengths[keys[:, 1]], self.capacity, self._lookahead)
                while len(self._plans) > 1:
                    del self._plans[next(iter(self._plans))]
                self._plans[epoch] = plan
            return self._plans[epoch]

    def sequences(self, start: int, stop: int) -> list[tuple[SampleKey, ...]]:
        packs: list[tuple[SampleKey, ...]] = []
        for epoch, first, last in self._split(start, stop):
            plan = self.plan(epoch)
            for pack in range(first, last):
                keys = plan.keys[plan.bounds[pack] : plan.bounds[pack + 1]].tolist()
                packs.append(tuple((e, i) for e, i in keys))
        return packs

    def keys(self, start: int, stop: int) -> np.ndarray:
        parts = [np.empty((0, 2), dtype=np.int64)]
        for epoch, first, last in self._split(start, stop):
            plan = self.plan(epoch)
            parts.append(plan.keys[plan.bounds[first] : plan.bounds[last]])
        return np.concatenate(parts)

    def epoch_length(self, epoch: int) -> int:
        return len(self.plan(epoch))

    def epoch_keys(self, epoch: int) -> np.ndarray:
        return self.plan(epoch).keys
