"""Lengths of all samples, which packing and the grouped order need before they read any sample.

Computed once, cached, and memory-mapped by all processes of a node: exact token lengths for packing, words with the
sign of the modality for the published grouped order.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from megatron_ross.data.errors import SampleError
from megatron_ross.data.index import default_cache_folder, locked, write_atomically

T = TypeVar("T")

STUB_LENGTH = 1
"""A sample whose record is broken is replaced by one token (quarantine.stub_sample)."""

_SPAWN_ABOVE = 20_000  # samples; starting processes takes seconds
_CHUNK = 500


class Measurable(Protocol):
    """A data set that knows the token lengths of its samples."""

    def __len__(self) -> int: ...

    def token_length(self, index: int) -> int: ...

    def modality_length(self, index: int) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def records_fingerprint(self) -> str: ...


def token_lengths(
    dataset: Measurable, *, cache_folder: Path | None = None, num_workers: int = 2, show_progress: bool = False
) -> np.ndarray:
    """int32 [num_samples]: tokens of every sample, images expanded and cut to max_length.

    One process of a node measures, the others wait for the file and map it.
    """
    return _cached(f"tokens {dataset.fingerprint}", cache_folder, lambda: measure(dataset, num_workers, show_progress))


def modality_lengths(
    dataset: Measurable, *, cache_folder: Path | None = None, num_workers: int = 2, show_progress: bool = False
) -> np.ndarray:
    """int32 [num_samples]: words of every record, negative without image, as `order.GroupedOrder` takes them; never 0.

    Cached like `token_lengths`, but independent of tokenizer and template.
    """

    def count() -> np.ndarray:
        title = "counting words"
        parts = map_samples(dataset, _words_of, range(len(dataset)), num_workers, show_progress, title)
        return _joined(parts)

    return _cached(f"words {dataset.records_fingerprint}", cache_folder, count)


def measure(dataset: Measurable, num_workers: int, show_progress: bool) -> np.ndarray:
    """Like `token_lengths`, without the cache."""
    title = "measuring samples"
    return _joined(map_samples(dataset, _lengths_of, range(len(dataset)), num_workers, show_progress, title))


def _cached(what: str, cache_folder: Path | None, compute: Callable[[], np.ndarray]) -> np.ndarray:
    folder = (cache_folder or default_cache_folder()) / "lengths"
    path = folder / f"{hashlib.blake2b(what.encode(), digest_size=12).hexdigest()}.npy"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            write_atomically(path, compute())
    return np.load(path, mmap_mode="r")


def _joined(parts: Iterable[list[int]]) -> np.ndarray:
    return np.array([length for part in parts for length in part], dtype=np.int32)


def _words_of(dataset: Any, indices: range) -> list[int]:
    return [dataset.modality_length(i) for i in indices]


def _lengths_of(dataset: Any, indices: range) -> list[int]:
    return [_length_of(dataset, i) for i in indices]


def _length_of(dataset: Measurable, index: int) -> int:
    try:
        return dataset.token_length(index)
    except SampleError:
        return STUB_LENGTH


def map_samples(
    dataset: Any,
    function: Callable[[Any, range], T],
    indices: range,
    num_workers: int,
    show_progress: bool,
    title: str,
    spawn_above: int | None = None,
) -> Iterator[T]:
    """`function(dataset, piece)` over the pieces of `indices`, in order, as they are done.

    More than `spawn_above` samples (by default, so many that it pays off for texts) are spread over worker processes.
    They are spawned, not forked: the calling process may have threads and a GPU.
    """
    pieces = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
    threshold = _SPAWN_ABOVE if spawn_above is None else spawn_above
    with tqdm(total=len(indices), desc=title, unit="sample", disable=not show_progress) as bar:
        if num_workers < 2 or len(indices) < threshold:
            for piece in pieces:
                yield function(dataset, piece)
                bar.update(len(piece))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_workers, context, _set_dataset, (dataset, function)) as pool:
            for piece, result in zip(pieces, pool.map(_run_piece, pieces), strict=True):
                yield result
                bar.update(len(piece))


_worker: list[Any] = []  # of a worker process: its data set and function, sent once instead of with every piece


def _set_dataset(dataset: Any, function: Callable[[Any, range], Any]) -> None:
    _worker[:] = [dataset, function]


def _run_piece(indices: Sequence[int]) -> Any:
    dataset, function = _worker
    return function(dataset, indices)
