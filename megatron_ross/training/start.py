"""Where a run starts: the checkpoint it resumes, or the weights it is initialised from."""

from __future__ import annotations

from pathlib import Path

from megatron_ross.checkpoint.manifest import (
    CHECKPOINTS_NAME,
    LATEST_NAME,
    MANIFEST_NAME,
    Manifest,
    iteration_dir,
    resolve_checkpoint,
)
from megatron_ross.checkpoint.retention import complete_iterations, earlier_checkpoint
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig


def start_path(run: RunConfig) -> Path:
    """Where weights come from: the run to resume if it has a checkpoint, else `init_from`."""
    if not is_resume(run):
        return checkpoints_of(run.training.init_from)
    root = checkpoints_of(run.training.load)
    return _unnamed(root) or root


def start_manifest(run: RunConfig) -> Manifest:
    """Of the checkpoint that the run starts from.

    Raises:
        ValueError: it cannot be used; to a run that resumes, the message offers the checkpoint before.
    """
    directory = resolve_checkpoint(start_path(run))
    try:
        return Manifest.read(directory)
    except ValueError as error:
        raise ValueError(f"{error}{earlier_checkpoint(directory) if is_resume(run) else ''}") from None


def is_resume(run: RunConfig) -> bool:
    """`load` names a run with a complete checkpoint. Without one, a run that also names `init_from` starts afresh.

    A run that was killed between the last two steps of its first save, which give the folder its name and then write
    `latest`, has a complete checkpoint, too: torchrun starts it again without asking anybody.

    Raises:
        ConfigError: there is nothing to load, and nothing to start from instead.
    """
    if not run.training.load:
        return False
    root = checkpoints_of(run.training.load)
    # A run that was interrupted before its first save may start afresh; one whose checkpoints are damaged must not.
    if run.training.init_from and not _was_ever_saved(root):
        return False
    try:
        resolve_checkpoint(_unnamed(root) or root)
    except ValueError as error:
        raise ConfigError(f"load={run.training.load!r}: {error}; {_what_to_do(root)}") from None
    return True


def _unnamed(root: Path) -> Path | None:
    """The newest complete checkpoint, where there is no `latest` to name one."""
    iterations = complete_iterations(root)
    return iteration_dir(root, iterations[-1]) if iterations and not (root / LATEST_NAME).exists() else None


def _was_ever_saved(root: Path) -> bool:
    return any((root / name).exists() for name in (LATEST_NAME, MANIFEST_NAME)) or bool(complete_iterations(root))


def _what_to_do(root: Path) -> str:
    iterations = complete_iterations(root)
    if not iterations:
        return "give init_from to start afresh"
    return f"complete checkpoints there: give load={iteration_dir(root, iterations[-1])} to go on from the newest"


def checkpoints_of(path: str) -> Path:
    """`path` may be a run folder or a checkpoint root."""
    folder = Path(path) / CHECKPOINTS_NAME
    return folder if folder.is_dir() else Path(path)
