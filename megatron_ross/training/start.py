"""Where a run starts: the checkpoint it resumes, or the weights it is initialised from."""

from __future__ import annotations

from pathlib import Path

from megatron_ross.checkpoint.manifest import resolve_checkpoint
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig


def start_path(run: RunConfig) -> Path:
    """Where weights come from: the run to resume if it has a checkpoint, else `init_from`."""
    return checkpoints_of(run.training.load if is_resume(run) else run.training.init_from)


def is_resume(run: RunConfig) -> bool:
    """`load` names a run with a complete checkpoint. Without one, a run that also names `init_from` starts afresh.

    Raises:
        ConfigError: there is nothing to load, and nothing to start from instead.
    """
    if not run.training.load:
        return False
    try:
        resolve_checkpoint(checkpoints_of(run.training.load))
    except ValueError as error:
        if run.training.init_from:
            return False
        raise ConfigError(f"load={run.training.load!r}: {error}; give init_from to start afresh") from None
    return True


def checkpoints_of(path: str) -> Path:
    """`path` may be a run folder or a checkpoint root."""
    folder = Path(path) / "checkpoints"
    return folder if folder.is_dir() else Path(path)
