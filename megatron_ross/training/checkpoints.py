"""When a run saves, what a failed save means, and what the log says about it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron_ross.checkpoint.agreement import CheckpointError
from megatron_ross.checkpoint.manifest import CHECKPOINTS_NAME, Manifest, iteration_dir
from megatron_ross.checkpoint.saver import CheckpointSaver, SavedCheckpoint, SavePolicy
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.training.resumed import PROGRESS_KEY


def prepare_run_folder(run: RunConfig) -> None:
    """Create the run folder and prove that files can be written there: now, not at the first save.

    Raises:
        OSError: they cannot; names the folder.
    """
    folder = Path(run.training.save) / CHECKPOINTS_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # a name of its own: all ranks do this at the same time
            probe.write(b"probe")
    except OSError as error:
        raise OSError(f"save={run.training.save!r}: cannot write there ({error.strerror}); choose another") from error


@dataclass(frozen=True)
class Snapshot:
    """What to save, once it is asked for: gathering the state costs time and messages."""

    manifest: Manifest
    state: Callable[[], ShardedStateDict]


class RunCheckpoints:
    """The checkpoints of one run. All methods but `is_writing` are collective.

    Args:
        say: prints a line on the logging rank.
    """

    def __init__(self, run: RunConfig, assets: Path, say: Callable[[str], None]) -> None:
        training = run.training
        self.root = Path(training.save) / CHECKPOINTS_NAME
        self.stall_seconds = 0.0
        self._has_saved = False
        self._stops = training.save_failure == "stop"
        self._say = say
        policy = SavePolicy(training.async_save, training.save_retain_last, training.save_retain_interval)
        self._saver = CheckpointSaver(self.root, assets, policy, run.parallel.distributed_timeout_minutes)

    def relative_base(self, base: Path, iteration: int) -> str:
        """The checkpoint that has what a trainable-only one leaves out, as its manifest names it."""
        return os.path.relpath(base, iteration_dir(self.root, iteration))

    @property
    def newest(self) -> Path | None:
        """The last checkpoint that this process has written; retention keeps it."""
        return self._saver.newest

    @property
    def is_writing(self) -> bool:
        return self._saver.is_writing

    def save(self, snapshot: Snapshot, *, is_last: bool = False) -> None:
        """Save, after the save before is finished; asynchronously unless it `is_last`.

        Raises:
            CheckpointError: it failed, and `save_failure` is `stop` or it `is_last`.
        """
        self.finish()
        if not self._has_saved:
            self._has_saved = True
            self._remove_leftovers()
        try:
            self._saver.save(snapshot.manifest, snapshot.state())
        except CheckpointError as error:
            self._failed(error, is_last)
            return
        if is_last or not self._saver.policy.async_save:
            self.finish(is_last=is_last)

    def _remove_leftovers(self) -> None:
        try:
            names = self._saver.remove_leftovers()
        except CheckpointError as error:  # which costs space, and no more
            self._say(f"warning: {error}")
            return
        if names:
            self._say(f"removed what an interrupted run left in {self.root}: {', '.join(names)}")

    def finish(self, *, is_last: bool = False) -> None:
        """End the pending save, if there is one."""
        try:
            saved = self._saver.finish()
        except CheckpointError as error:
            self._failed(error, is_last)
            return
        if saved is not None:
            self._report(saved)

    def _report(self, saved: SavedCheckpoint) -> None:
        self.stall_seconds += saved.stall_seconds
        removed = f", removed {len(saved.removed)} older" if saved.removed else ""
        self._say(
            f"saved {saved.directory} in {saved.total_seconds:.2f} s, "
            f"of which training stood still {saved.stall_seconds:.2f} s{removed}"
        )
        if saved.complaint:
            self._say(f"warning: {saved.complaint}")

    def _failed(self, error: CheckpointError, is_last: bool) -> None:
        if self._stops or is_last:
            raise CheckpointError(f"{error}; free space or choose another folder, then resume") from error
        self._say(f"warning: {error}; training goes on without this checkpoint (save_failure=continue)")

    def take_stall(self) -> float:
        """Seconds that training stood still for saves since the last call."""
        seconds, self.stall_seconds = self.stall_seconds, 0.0
        return seconds

    def close(self) -> None:
        self._saver.close()


def trained_model(model: RossModelConfig, run: RunConfig) -> RossModelConfig:
    """The model as its manifest describes it from now on: the tower sees the images that this run has shown it, and the
    denoiser has the objective it is trained with."""
    model = replace(model, vision=model.vision.shown(run.data.image_aspect_ratio, run.data.image_conversion))
    if model.denoiser is None or not run.loss.denoiser_passes or run.trainability.freeze_mm_inv_projector:
        return model
    return replace(model, denoiser=replace(model.denoiser, objective=run.loss.recon_objective))


def training_record(
    losses: dict[str, float], run: RunConfig, data: dict[str, Any], layout: str, progress: dict[str, Any]
) -> dict[str, Any]:
    """The manifest's `training` entry; `progress` is from `resumed.record_of`."""
    return {**losses, "settings": run.to_flat(), "data": data, "layout": layout, PROGRESS_KEY: progress}
