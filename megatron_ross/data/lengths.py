"""Lengths of all samples, which packing and the grouped order need before they read any sample.

Computed once, cached, and memory-mapped by all processes of a node: exact token lengths for packing, words with the
sign of the modality for the published grouped order. One process of a node computes, with workers on the cores that it
may use, and saves a part whenever one is done: killed and started again, it goes on behind the last. It tells its
watchdog of every piece; the processes that wait tell theirs of every part they see, so they outlast a long computation
but not one that stands still.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from megatron_ross.data.errors import SampleError
from megatron_ross.data.index import default_cache_folder, write_atomically

T = TypeVar("T")

STUB_LENGTH = 1
"""A sample whose record is broken is replaced by one token (quarantine.stub_sample)."""

_SPAWN_ABOVE = 20_000  # samples; starting processes takes seconds
_CHUNK = 500
_PART = 20_000  # samples of a part on disk: seconds of work on one core
_MAX_WORKERS = 64  # each has some 300 MB of imports
_POLL_S = 0.5

Beat = Callable[[str], None]
"""Tells a watchdog what goes on (`training.watchdog.Watchdog.beat`)."""


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
    dataset: Measurable,
    *,
    cache_folder: Path | None = None,
    num_workers: int | None = None,
    show_progress: bool = False,
    beat: Beat | None = None,
) -> np.ndarray:
    """int32 [num_samples]: tokens of every sample, images expanded and cut to max_length.

    One process of a node measures, the others wait for the file and map it.

    Args:
        num_workers: processes; None takes the cores that this process may use.
        beat: called again and again while this process measures, and while it waits for one that gets on.
    """
    work = _Work(dataset, _lengths_of, "measuring samples", num_workers, show_progress)
    return _cached(f"tokens {dataset.fingerprint}", cache_folder, work, beat)


def modality_lengths(
    dataset: Measurable,
    *,
    cache_folder: Path | None = None,
    num_workers: int | None = None,
    show_progress: bool = False,
    beat: Beat | None = None,
) -> np.ndarray:
    """int32 [num_samples]: words of every record, negative without image, as `order.GroupedOrder` takes them; never 0.

    Cached like `token_lengths`, but independent of tokenizer and template. Arguments as there.
    """
    work = _Work(dataset, _words_of, "counting words", num_workers, show_progress)
    return _cached(f"words {dataset.records_fingerprint}", cache_folder, work, beat)


def measure(dataset: Measurable, num_workers: int, show_progress: bool) -> np.ndarray:
    """Like `token_lengths`, without the cache."""
    work = _Work(dataset, _lengths_of, "measuring samples", num_workers, show_progress)
    return np.concatenate(list(work.pieces(0)))


def available_cores() -> int:
    """Cores that this process may use: its CPU affinity, and its share of the machine (cgroup 2) where it has one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup 2, or "max": no share
        pass
    return max(1, cores)


class _Work:
    """Lengths of all samples of a data set."""

    def __init__(
        self,
        dataset: Measurable,
        function: Callable[[Any, range], list[int]],
        title: str,
        num_workers: int | None,
        show_progress: bool,
    ) -> None:
        self.num_samples, self.title = len(dataset), title
        self._dataset, self._function = dataset, function
        self._num_workers = min(available_cores(), _MAX_WORKERS) if num_workers is None else num_workers
        self._show_progress = show_progress

    def pieces(self, start: int) -> Iterator[np.ndarray]:
        """int32 lengths of the samples from `start` on, piece by piece.

        Raises:
            OSError: a worker process died.
        """
        indices = range(start, self.num_samples)
        try:
            for piece in map_samples(
                self._dataset, self._function, indices, self._num_workers, self._show_progress, self.title
            ):
                yield np.array(piece, dtype=np.int32)
        except BrokenProcessPool as error:
            raise OSError(
                f"{self.title}: a worker process ended, perhaps for lack of memory; the same command goes on from there"
            ) from error


def _cached(what: str, cache_folder: Path | None, work: _Work, beat: Beat | None) -> np.ndarray:
    folder = (cache_folder or default_cache_folder()) / "lengths"
    path = folder / f"{hashlib.blake2b(what.encode(), digest_size=12).hexdigest()}.npy"
    parts = path.with_suffix(".parts")
    with _locked(path.with_suffix(".lock"), parts, work, beat):
        if not path.exists():
            write_atomically(path, _computed(work, parts, beat))
            shutil.rmtree(parts, ignore_errors=True)
    return np.load(path, mmap_mode="r")


def _computed(work: _Work, parts: Path, beat: Beat | None) -> np.ndarray:
    """All lengths; those of finished parts are read, and every part that is finished now is saved."""
    parts.mkdir(exist_ok=True)
    done = _saved(parts)
    size = sum(map(len, done))
    new: list[np.ndarray] = []
    for piece in work.pieces(size):
        new.append(piece)
        size += len(piece)
        if beat is not None:
            beat(f"{work.title}, {size:,} of {work.num_samples:,}")
        if sum(map(len, new)) >= _PART:
            done.append(np.concatenate(new))
            new = []
            write_atomically(parts / f"{size:012}.npy", done[-1])
    return np.concatenate([*done, *new])


def _saved(parts: Path) -> list[np.ndarray]:
    """The parts up to the first that is damaged."""
    done: list[np.ndarray] = []
    size = 0
    for path in _finished(parts):
        try:
            part = np.load(path)
        except (ValueError, OSError, EOFError):  # a file system that lost its end
            break
        size += len(part)
        if path.name != f"{size:012}.npy":
            break
        done.append(part)
    return done


def _finished(parts: Path) -> list[Path]:
    """Files of the parts; each is named by the samples that are done with it."""
    return sorted(parts.glob("*.npy"))


@contextlib.contextmanager
def _locked(lock: Path, parts: Path, work: _Work, beat: Beat | None) -> Iterator[None]:
    """Only one process of the node at a time; those that wait beat whenever the one at work has saved another part."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    seen: list[Path] = []
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                finished = _finished(parts)
                if finished != seen and beat is not None:
                    beat(f"{work.title} in another process, {len(finished):,} parts done")
                seen = finished
                time.sleep(_POLL_S)
        yield


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
            try:
                for piece, result in zip(pieces, pool.map(_run_piece, pieces), strict=True):
                    yield result
                    bar.update(len(piece))
            except BaseException:  # whoever stops does not wait for what is left
                pool.shutdown(wait=False, cancel_futures=True)
                raise


_worker: list[Any] = []  # of a worker process: its data set and function, sent once instead of with every piece


def _set_dataset(dataset: Any, function: Callable[[Any, range], Any]) -> None:
    _worker[:] = [dataset, function]
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _run_piece(indices: Sequence[int]) -> Any:
    dataset, function = _worker
    return function(dataset, indices)
