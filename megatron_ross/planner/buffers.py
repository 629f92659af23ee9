"""How Megatron's data-parallel buffers hold trainable parameters: order, padding, and each rank's optimizer shard.

Rules of `megatron.core.distributed`: parameters in reverse order, each at a multiple of 64 elements, buckets padded so
that every data-parallel rank owns an equal part of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ross.planner.parameters import Parameter

_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class Buffer:
    """Trainable parameters of one chunk: (start, end) of every parameter and of every bucket, in elements."""

    parameters: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        """Elements with padding: what is allocated."""
        return self.buckets[-1][1] if self.buckets else 0

    def shard_numel(self, dp_rank: int, dp_size: int) -> int:
        """Elements, without padding, whose optimizer state lives on this data-parallel rank."""
        total = 0
        for first, last in self.buckets:
            part = (last - first) // dp_size
            low, high = first + dp_rank * part, first + (dp_rank + 1) * part
            total += sum(max(0, min(end, high) - max(start, low)) for start, end in self.parameters)
        return total


def build_buffer(parameters: Sequence[Parameter], dp_size: int, bucket_size: int | None) -> Buffer:
    """Lay out a chunk's trainable parameters; `bucket_size` None makes one bucket."""
    alignment = math.lcm(dp_size, _BUCKET_ALIGNMENT)
    places: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start, position, is_open = 0, 0, False

    def close(end: int) -> int:
        nonlocal bucket_start, is_open
        end = _round_up(end, alignment)
        buckets.append((bucket_start, end))
        bucket_start, is_open = end, False
        return end

    for parameter in reversed([p for p in parameters if p.trainable]):
        position = _round_up(position, _PARAMETER_ALIGNMENT)
        if parameter.shared_embedding and is_open:
            position = close(position)
        start, position = position, position + parameter.numel
        places.append((start, position))
        is_open = True
        if parameter.shared_embedding or (bucket_size is not None and position - bucket_start >= bucket_size):
            position = close(position)
    if is_open:
        close(position)
    return Buffer(tuple(places), tuple(buckets))


def bucket_size(
    dp_size: int, *, overlap_grad_reduce: bool, pp_rank: int, chunk: int, asked: int | None = None
) -> int | None:
    """Megatron splits buffers only where reductions overlap: on the first pipeline rank's first chunk.

    `asked` is the run's ddp_bucket_size.
    """
    splits = overlap_grad_reduce and pp_rank == 0 and chunk == 0
    return (asked or max(40_000_000, 1_000_000 * dp_size)) if splits else None


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
