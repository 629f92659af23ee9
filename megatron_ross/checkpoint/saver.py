"""Writing checkpoints: complete or not at all, at once or beside training.

A checkpoint is written to `iter_N.incomplete`, renamed when every rank has written its part, and only then named in
`latest_checkpointed_iteration.txt`. Megatron's interface of an asynchronous save is used, but not its child processes
(`writer.py` says why): a thread of each rank writes a copy of the state, and agrees with the others' threads over a
process group of its own. What ends a save is done between two steps, when all threads are done.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ross.checkpoint.agreement import raise_together, run_on_rank_0
from megatron_ross.checkpoint.checksums import checksums, other_files, own_data_files
from megatron_ross.checkpoint.manifest import ASSETS_NAME, MANIFEST_NAME, Manifest, iteration_dir, write_latest
from megatron_ross.checkpoint.retention import PARTIAL_SUFFIX, remove_checkpoint, remove_leftovers, remove_superseded
from megatron_ross.checkpoint.writer import begin_write
from megatron_ross.text_files import sync_files


@dataclass(frozen=True)
class SavePolicy:
    """How a run saves; the settings of the same names."""

    async_save: bool = False
    save_retain_last: int | None = None
    save_retain_interval: int | None = None


@dataclass(frozen=True)
class SavedCheckpoint:
    """What a finished save was.

    Attributes:
        stall_seconds: that training stood still for it.
        total_seconds: until it was done.
        removed: iterations of older checkpoints that went.
        complaint: why older ones could not be removed; empty if all is well.
    """

    directory: Path
    stall_seconds: float
    total_seconds: float
    removed: list[int]
    complaint: str


@dataclass
class _Pending:
    manifest: Manifest
    partial: Path
    written: Future[dict[str, str]]
    begin: float
    stall: float


class CheckpointSaver:
    """Saves the checkpoints of one run. All methods but `is_writing` are collective.

    Args:
        root: folder of the checkpoints.
        assets: tokenizer and processor files that each checkpoint holds. Copied from there once, then from the newest
            checkpoint: what a run resumed from may have been removed since.
        timeout_minutes: of the collectives among writing threads.
    """

    def __init__(self, root: Path, assets: Path, policy: SavePolicy, timeout_minutes: float = 10.0) -> None:
        self.root, self.policy = root, policy
        self._assets = assets
        self.newest: Path | None = None
        self._pending: _Pending | None = None
        self._group: dist.ProcessGroup | None = None
        self._thread: ThreadPoolExecutor | None = None
        if policy.async_save:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @property
    def is_writing(self) -> bool:
        """This rank's part of the pending save is not on disk yet."""
        return self._pending is not None and not self._pending.written.done()

    def remove_leftovers(self) -> list[str]:
        """Remove what killed processes left in the root, before the first save; the names of what went.

        The save that a process was killed in may never be repeated: its partial would stay for ever.

        Raises:
            CheckpointError: on every rank; the root cannot be read.
        """
        assert self._pending is None, "a save is being written"
        return run_on_rank_0(lambda: remove_leftovers(self.root), f"look for leftovers in {self.root}")

    def save(self, manifest: Manifest, state: ShardedStateDict) -> None:
        """Begin to write ROOT/iter_N; `finish` ends it. Asynchronous saves return when the state is copied.

        The save before must be finished.

        Raises:
            CheckpointError: on every rank, when any rank could not begin; nothing of the checkpoint remains.
        """
        assert self._pending is None, "the save before was not finished"
        begin = time.perf_counter()
        partial = iteration_dir(self.root, manifest.iteration)
        partial = partial.with_name(partial.name + PARTIAL_SUFFIX)
        run_on_rank_0(lambda: _start_folder(partial), f"prepare {partial}")
        write: Callable[[], None] | None = None
        error: BaseException | None = None
        try:
            write = begin_write(state, partial, self._group, copy=self.policy.async_save)
        except (Exception, CheckpointException) as caught:  # any fault; agreed on below, so no rank is left behind
            error = caught
        raise_together(error, f"write {partial}", cleanup=partial)
        assert write is not None
        written = self._start(write, partial)
        self._pending = _Pending(manifest, partial, written, begin, time.perf_counter() - begin)

    def _start(self, write: Callable[[], None], partial: Path) -> Future[dict[str, str]]:
        rank = dist.get_rank()

        def run() -> dict[str, str]:
            """Write this rank's part; checksums of what it wrote, and on rank 0 of all other files."""
            write()
            paths = own_data_files(partial, rank)
            if rank == 0:
                shutil.copytree(self._assets, partial / ASSETS_NAME, dirs_exist_ok=True)
                save_config(CheckpointingConfig("torch_dist", 1), str(partial))
                paths += other_files(partial)
            sync_files(paths)  # before the manifest says that they are there
            return checksums(partial, paths)

        if self._thread is not None:
            return self._thread.submit(run)
        written: Future[dict[str, str]] = Future()
        try:
            written.set_result(run())
        except (Exception, CheckpointException) as caught:  # as a thread would; `finish` raises it on all ranks
            written.set_exception(caught)
        return written

    def finish(self) -> SavedCheckpoint | None:
        """Wait for the pending save and publish it; None if there is none.

        Raises:
            CheckpointError: on every rank, when any rank could not write; nothing of the failed checkpoint remains.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        resumed = time.perf_counter()
        error = pending.written.exception()
        directory = iteration_dir(self.root, pending.manifest.iteration)
        raise_together(error, f"write checkpoint {directory}", cleanup=pending.partial)
        files: list[dict[str, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(files, pending.written.result())
        manifest = replace(pending.manifest, files={name: sha for part in files for name, sha in part.items()})
        run_on_rank_0(
            lambda: _publish(pending.partial, directory, manifest), f"publish checkpoint {directory}", pending.partial
        )
        self.newest, self._assets = directory, directory / ASSETS_NAME
        removed, complaint = run_on_rank_0(
            lambda: self._remove_superseded(manifest.iteration), f"remove old checkpoints of {self.root}"
        )
        now = time.perf_counter()
        return SavedCheckpoint(directory, pending.stall + now - resumed, now - pending.begin, removed, complaint)

    def _remove_superseded(self, newest: int) -> tuple[list[int], str]:
        """What went, and what went wrong: the new checkpoint is there all the same."""
        policy = self.policy
        try:
            return remove_superseded(self.root, newest, policy.save_retain_last, policy.save_retain_interval), ""
        except OSError as error:
            return [], f"cannot remove old checkpoints of {self.root}: {error}"

    def close(self) -> None:
        """End the writing thread; a pending save is waited for, but not published."""
        if self._thread is not None:
            self._thread.shutdown()


def _start_folder(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _publish(partial: Path, directory: Path, manifest: Manifest) -> None:
    """Each step is on disk before the next begins, also when the power fails."""
    sync_files([partial / ASSETS_NAME])
    manifest.write(partial)
    if (directory / MANIFEST_NAME).is_file():
        remove_checkpoint(directory)
    shutil.rmtree(directory, ignore_errors=True)  # what an interrupted removal left
    partial.rename(directory)
    write_latest(directory.parent, manifest.iteration)
