"""Where a run starts: the checkpoint it resumes, or the weights it is initialised from. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from megatron_ross.checkpoint.locate import Kind, identify, megatron_checkpoint
from megatron_ross.checkpoint.manifest import (
    CHECKPOINTS_NAME,
    LATEST_NAME,
    MANIFEST_NAME,
    Manifest,
    iteration_dir,
    iteration_of,
    resolve_checkpoint,
)
from megatron_ross.checkpoint.retention import complete_iterations, earlier_checkpoint
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from, and whether it resumes it or takes only its weights."""

    directory: Path
    manifest: Manifest
    resumes: bool


def start_of(run: RunConfig) -> Start:
    """The run to resume if it has a checkpoint, else `init_from`.

    Raises:
        ConfigError: there is nothing to load, and nothing to start from instead.
        ValueError: the checkpoint cannot be used; to a run that resumes, the message offers the one before.
    """
    resumed = resumed_checkpoint(run)
    directory = resumed or megatron_checkpoint(run.training.init_from, "init_from")
    try:
        return Start(directory, Manifest.read(directory), resumed is not None)
    except ValueError as error:
        raise ValueError(f"{error}{earlier_checkpoint(directory) if resumed else ''}") from None


def with_image_conversion(run: RunConfig, start: Start | None) -> RunConfig:
    """The run with `image_conversion` decided: a run that resumes goes on as it was trained, a new one as a viewer."""
    trained = start.manifest.model.vision.image_conversion if start is not None and start.resumes else "viewer"
    chosen = cast(Literal["viewer", "published"], run.data.image_conversion or trained)
    return replace(run, data=replace(run.data, image_conversion=chosen))


def resumed_checkpoint(run: RunConfig) -> Path | None:
    """The complete checkpoint of the run that `load` names. None: there is none, and `init_from` says what to do.

    A run that was killed between the last two steps of its first save, which give the folder its name and then write
    `latest`, has a complete checkpoint, too: torchrun starts it again without asking anybody.

    Raises:
        ConfigError: there is nothing to load, and nothing to start from instead.
    """
    if not run.training.load:
        return None
    root = checkpoints_of(run.training.load)
    if (Path(run.training.load) / "config.json").is_file():
        identify(run.training.load, "load").require("load", Kind.RUN, Kind.CHECKPOINT)
    named = iteration_of(root)
    if named is not None:
        _check_named(run, root, named)
    # A run that was interrupted before its first save may start afresh; one whose checkpoints are damaged must not.
    elif run.training.init_from and not _was_ever_saved(root):
        return None
    try:
        return resolve_checkpoint(_unnamed(root) or root)
    except ValueError as error:
        raise ConfigError(f"load={run.training.load!r}: {error}; {_what_to_do(root)}") from None


def refuse_to_mix(run: RunConfig) -> None:
    """Refuse to save to a folder that holds checkpoints of a run that this one does not resume.

    Two runs are the same if `load` names the folder that `save` names. Any other would replace checkpoints of the same
    iteration, and turn `latest` back.

    Raises:
        ConfigError: names the folder, and what to give instead.
    """
    save, load = run.training.save, run.training.load
    if not save:
        return
    root = Path(save) / CHECKPOINTS_NAME
    if not _was_ever_saved(root) or (load and checkpoints_of(load).resolve() == root.resolve()):
        return
    iterations = complete_iterations(root)
    held = f"iteration {iterations[-1]} is the last" if iterations else f"{root / LATEST_NAME} is there"
    raise ConfigError(
        f"save={save!r}: holds checkpoints of another run ({held}), and load={load!r} does not resume it; give "
        f"load={save} to go on with that run, or another save for a new one"
    )


def check_unchanged(run: RunConfig, start: Start) -> None:
    """Until it had the run folder for itself, another run may have saved there.

    Raises:
        ConfigError: it has; the start would be from an older checkpoint.
    """
    refuse_to_mix(run)
    now = start_of(run).directory
    if now != start.directory:
        raise ConfigError(f"save={run.training.save!r}: another run has just saved {now}; start again")


def _check_named(run: RunConfig, directory: Path, iteration: int) -> None:
    """Refuse one checkpoint of the run's own folder: started again, the run would return to it, or find it removed."""
    save, root = run.training.save, directory.parent
    if save and root.resolve() == (Path(save) / CHECKPOINTS_NAME).resolve():
        raise ConfigError(
            f"load={run.training.load!r}: is one checkpoint of the run that is saved to, and whoever starts this run "
            f"again would return to it: write {iteration} into {root / LATEST_NAME}, and give load={save}"
        )


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
    return f"complete checkpoints there: write {iterations[-1]} into {root / LATEST_NAME} to go on from the newest"


def checkpoints_of(path: str) -> Path:
    """`path` may be a run folder or a checkpoint root."""
    folder = Path(path) / CHECKPOINTS_NAME
    return folder if folder.is_dir() else Path(path)
