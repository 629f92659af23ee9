"""The loader of one rank: microbatches of the next global batch, prepared ahead, and the position to resume from.

Every rank of a data-parallel replica builds its own loader over the same metadata; they differ only in the pixels they
decode, so no sample is ever sent between ranks. A step is a pure function of the number of sequences consumed so far.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_ross.data.batch import ImageSpan, RossMicrobatch, RossSample
from megatron_ross.data.collate import LatentLoader, collate, collate_packed
from megatron_ross.data.decoders import PillowDecoder, PixelDecoder
from megatron_ross.data.errors import ImageError, SampleError
from megatron_ross.data.held_out import NO_SAMPLE
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.latent_cache import LatentReader
from megatron_ross.data.order import SampleKey, SampleOrder
from megatron_ross.data.quarantine import (
    BadSamplePolicy,
    Finding,
    Quarantine,
    SampleStatus,
    finding_of,
    skip_samples,
    stub_sample,
)


class SampleSource(Protocol):
    """What the loader needs of a data set."""

    image_processor: ImageProcessor

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RossSample: ...


@dataclass(frozen=True)
class _Placed:
    """A sample of this rank and its position among all samples of the global batch."""

    position: int
    epoch: int
    sample: RossSample


@dataclass(frozen=True)
class _Step:
    """A prepared step: microbatches, what this rank found out, and where each sample lies (microbatch, row, span)."""

    batches: list[RossMicrobatch]
    findings: dict[int, Finding]
    places: dict[int, tuple[int, tuple[int, int, int]]]


class RossLoader:
    """Yields steps: lists of microbatches of one common sequence length."""

    def __init__(
        self,
        dataset: SampleSource,
        order: SampleOrder,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
        seq_multiple: int = 1,
        pack_length: int | None = None,
        want_pixels: bool = True,
        reference_dummy_images: bool = False,
        prefetch: int = 2,
        num_workers: int = 4,
        decoder: PixelDecoder | None = None,
        latents: LatentReader | None = None,
        bad_samples: BadSamplePolicy | None = None,
        source_ends: Sequence[int] = (),
        num_sequences: int | None = None,
    ):
        """
        Args:
            global_batch_size: sequences per step over all data-parallel ranks.
            seq_multiple: sequence lengths are rounded up to a multiple of it (TP size with sequence parallelism).
            pack_length: T of packed sequences, the capacity of a `packing.PackedOrder`; None pads one sample per row.
            want_pixels: False on ranks that run neither the tower nor the VAE.
            prefetch: steps prepared ahead in the background; 0 prepares each when it is asked for.
            num_workers: threads that decode images with Pillow.
            decoder: replaces Pillow. The loader closes it.
            latents: reads VAE moments from a cache, on ranks that need them; None reads none. The loader closes it.
            bad_samples: skip broken samples by this policy; None stops the run at the first one.
            source_ends: one past the last sample id of each source of a blend, to count what each contributes.
            num_sequences: prepare nothing beyond so many; None goes on for ever.

        Raises:
            ValueError: sizes that do not divide, or an order made for another data set.
        """
        _check_sizes(dataset, order, global_batch_size, micro_batch_size, dp_size, seq_multiple, pack_length)
        self._dataset = dataset
        self._order = order
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._seq_multiple = seq_multiple
        self._pack_length = pack_length
        self._collate_settings: dict[str, Any] = {
            "image_size": dataset.image_processor.image_size,
            "tp_rank": tp_rank,
            "tp_size": tp_size,
            "want_pixels": want_pixels,
            "reference_dummy_images": reference_dummy_images,
        }
        self._prefetch = prefetch
        # Two: one step's texts and tensors are made while the other's images are decoded.
        self._step_pool = ThreadPoolExecutor(2, thread_name_prefix="ross-step")
        self._decoder = decoder or PillowDecoder(num_workers)
        self._latents = latents
        self._source_ends = np.asarray(source_ends, dtype=np.int64)
        self._quarantine = Quarantine(bad_samples) if bad_samples is not None else None
        self._num_sequences = num_sequences
        self._pending: deque[Future[_Step]] = deque()
        self.wait_s = 0.0
        self._reset_position()

    def next_step(self) -> list[RossMicrobatch]:
        """This data-parallel rank's microbatches of the next global batch.

        `wait_s` then holds the seconds spent waiting for it.

        Raises:
            SampleError: a sample is broken and there is no policy for that.
            TooManyBadSamplesError: by the policy, on every rank in the same step.
            Exception: whatever else the background thread raised.
        """
        begin = time.perf_counter()
        self._fill(max(1, self._prefetch))
        step = self._pending.popleft().result()
        self.wait_s = time.perf_counter() - begin
        start, stop = self.consumed_sequences, self.consumed_sequences + self._global_batch_size
        if self._quarantine is not None:
            self._settle(self._quarantine, step, start, stop)
        self._advance(stop)
        if self._quarantine is not None:
            self._quarantine.check(self.consumed_samples)
        self._fill(self._prefetch)
        return step.batches

    @property
    def bad_sample_counts(self) -> dict[str, int]:
        """Samples so far by status (bad, mismatch, images_cut), over all ranks; for the log."""
        return dict(self._quarantine.counts) if self._quarantine is not None else {}

    @property
    def consumed_by_source(self) -> list[int]:
        """Samples consumed so far from each source of a blend; empty without `source_ends`."""
        return self._by_source.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Position, digest of all (epoch, sample id) consumed so far, and counts; the same on every rank."""
        return {
            "consumed_sequences": self.consumed_sequences,
            "consumed_samples": self.consumed_samples,
            "digest": self._digest.hexdigest(),
            "bad_samples": self.bad_sample_counts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, with any layout, batch size and number of workers.

        Raises:
            ValueError: this order would have consumed other samples (other data, seed or order).
        """
        self._drop_pending()
        self._reset_position()
        self._advance(int(state["consumed_sequences"]))
        if self._digest.hexdigest() != state["digest"]:
            raise ValueError(
                f"the checkpoint consumed other samples in its first {state['consumed_sequences']} sequences than this "
                "run would have: data, seed, order or packing changed; restore them or start without its data state"
            )
        if self._quarantine is not None:
            self._quarantine.counts.clear()
            self._quarantine.counts.update(state.get("bad_samples", {}))

    def rewind(self) -> None:
        """Start again at the first sequence, with nothing counted."""
        self._drop_pending()
        self._reset_position()
        if self._quarantine is not None:
            self._quarantine.clear()

    def close(self) -> None:
        """Stop the background threads."""
        self._drop_pending()
        self._step_pool.shutdown(cancel_futures=True)
        self._decoder.close()
        if self._latents is not None:
            self._latents.close()

    def _reset_position(self) -> None:
        self.consumed_sequences = 0
        self.consumed_samples = 0
        self._by_source = np.zeros(len(self._source_ends), dtype=np.int64)
        self._digest = hashlib.blake2b(digest_size=16)

    def _advance(self, stop: int) -> None:
        keys = self._order.keys(self.consumed_sequences, stop)
        self._digest.update(keys.astype("<i8").tobytes())
        self.consumed_sequences = stop
        self.consumed_samples += len(keys)
        if len(self._source_ends):
            sources = np.searchsorted(self._source_ends, keys[:, 1], side="right")
            self._by_source += np.bincount(sources, minlength=len(self._source_ends))

    def _fill(self, depth: int) -> None:
        while len(self._pending) < depth:
            start = self.consumed_sequences + len(self._pending) * self._global_batch_size
            if self._num_sequences is not None and start >= self._num_sequences:
                return
            self._pending.append(self._step_pool.submit(self._build_step, start))

    def _drop_pending(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()

    def _settle(self, quarantine: Quarantine, step: _Step, start: int, stop: int) -> None:
        """Agree on the broken samples of a step and take this rank's ones out of it."""
        skipped = quarantine.settle(self._order.keys(start, stop), step.findings)
        segments: dict[int, list[tuple[int, int, int]]] = {}
        for position in skipped:
            if position in step.places:
                batch, segment = step.places[position]
                segments.setdefault(batch, []).append(segment)
        for batch, found in segments.items():
            skip_samples(step.batches[batch], found)

    def _build_step(self, start: int) -> _Step:
        sequences = self._order.sequences(start, start + self._global_batch_size)
        findings: dict[int, Finding] = {}
        microbatches = self._my_samples(sequences, findings)
        if self._pack_length is None:
            samples = [placed.sample for rows in microbatches for row in rows for placed in row]
            longest = max(len(sample.input_ids) for sample in samples)
            seq_length = -(-longest // self._seq_multiple) * self._seq_multiple
        else:
            seq_length = self._pack_length
        batches = [self._collate(rows, seq_length, findings) for rows in microbatches]
        places: dict[int, tuple[int, tuple[int, int, int]]] = {}
        for number, rows in enumerate(microbatches):
            for position, segment in _segments(rows, seq_length, self._pack_length is not None):
                places[position] = (number, segment)
        return _Step(batches, findings, places)

    def _my_samples(
        self, sequences: Sequence[Sequence[SampleKey]], findings: dict[int, Finding]
    ) -> list[list[list[_Placed]]]:
        """[microbatch][sequence][sample] of this data-parallel rank."""
        positions = [0]
        for sequence in sequences:
            positions.append(positions[-1] + len(sequence))
        size = self._micro_batch_size
        return [
            [
                [self._get(positions[row] + i, key, findings) for i, key in enumerate(sequences[row])]
                for row in range(begin, begin + size)
            ]
            for begin in range(self._dp_rank * size, len(sequences), size * self._dp_size)
        ]

    def _get(self, position: int, key: SampleKey, findings: dict[int, Finding]) -> _Placed:
        epoch, sample_id = key
        if sample_id == NO_SAMPLE:
            return _Placed(position, epoch, stub_sample(sample_id))
        try:
            sample = self._dataset[sample_id]
        except SampleError as error:
            if self._quarantine is None:
                raise
            sample = stub_sample(sample_id)
            findings[position] = Finding(SampleStatus.BAD, str(error))
        else:
            finding = finding_of(sample, self._quarantine.policy.template if self._quarantine is not None else "")
            if finding is not None:
                findings[position] = finding
        return _Placed(position, epoch, sample)

    def _collate(self, rows: list[list[_Placed]], seq_length: int, findings: dict[int, Finding]) -> RossMicrobatch:
        owner = {id(span): placed.position for row in rows for placed in row for span in placed.sample.images}

        def checked(
            spans: Sequence[ImageSpan | None], results: list[Tensor | ImageError], empty: tuple[int, ...]
        ) -> list[Tensor]:
            """Findings written down, and zeros of shape `empty` in their places."""
            for span, result in zip(spans, results, strict=True):
                if isinstance(result, SampleError):
                    if self._quarantine is None:
                        raise result
                    findings[owner[id(span)]] = Finding(SampleStatus.BAD, str(result))
            return [torch.zeros(empty) if isinstance(r, SampleError) else r for r in results]

        def load(spans: Sequence[ImageSpan]) -> list[Tensor]:
            size = self._collate_settings["image_size"]
            return checked(spans, self._decoder.decode(spans), (3, size, size))

        settings = dict(self._collate_settings)
        if (reader := self._latents) is not None:
            shape = reader.moments_shape
            settings["latents"] = LatentLoader(shape, lambda spans: checked(spans, reader.read(spans), shape))
        packs = [[(placed.epoch, placed.sample) for placed in row] for row in rows]
        if self._pack_length is not None:
            return collate_packed(packs, seq_length, load=load, **settings)
        return collate([pair for pack in packs for pair in pack], seq_length, load=load, **settings)


def _segments(rows: list[list[_Placed]], seq_length: int, packed: bool) -> list[tuple[int, tuple[int, int, int]]]:
    """(position, (row, first token, one past the last)) of every sample of a microbatch."""
    segments = []
    for number, row in enumerate(rows):
        offset = number * seq_length if packed else 0
        for placed in row:
            end = offset + len(placed.sample.input_ids)
            segments.append((placed.position, (0 if packed else number, offset, end)))
            offset = end
    return segments


def _check_sizes(
    dataset: SampleSource,
    order: SampleOrder,
    global_batch_size: int,
    micro_batch_size: int,
    dp_size: int,
    seq_multiple: int,
    pack_length: int | None,
) -> None:
    if global_batch_size % (micro_batch_size * dp_size):
        raise ValueError(
            f"global_batch_size {global_batch_size} must be a multiple of micro_batch_size {micro_batch_size} x "
            f"data-parallel size {dp_size}"
        )
    if order.num_samples != len(dataset):
        raise ValueError(f"the order is over {order.num_samples} samples, the data set has {len(dataset)}")
    if pack_length is not None and pack_length % seq_multiple:
        raise ValueError(f"pack_length {pack_length} must be a multiple of {seq_multiple}")
    if (pack_length is not None) != hasattr(order, "capacity"):
        raise ValueError("pack_length and packing.PackedOrder come together: give both or neither")
    if pack_length is not None and pack_length != getattr(order, "capacity", None):
        raise ValueError(f"pack_length {pack_length} differs from the order's capacity {getattr(order, 'capacity', 0)}")
