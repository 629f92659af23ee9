"""Loading training checkpoints of any layout with Megatron's dist checkpointing (torch_dist)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ross.checkpoint.agreement import CheckpointError, raise_together
from megatron_ross.checkpoint.checksums import verify_files
from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.checkpoint.model_state import load_model_state, with_tied_copy, without_tied_copy
from megatron_ross.checkpoint.optimizer_state import load_optimizer_state, optimizer_sharded_state
from megatron_ross.checkpoint.reader import check_loadable
from megatron_ross.checkpoint.retention import earlier_checkpoint
from megatron_ross.checkpoint.state import merged_model_state
from megatron_ross.models.ross_stage import RossStage
from megatron_ross.parallel.groups import ParallelGroups


def load_weights(path: Path, stages: list[RossStage]) -> Manifest:
    """Load model weights from a checkpoint of any layout.

    Raises:
        ValueError: not a checkpoint. CheckpointError: a weight is missing or has another shape.
    """
    directory = resolve_checkpoint(path)
    _load_model(directory, stages)
    return Manifest.read(directory)


def base_of(directory: Path) -> Path | None:
    """The checkpoint that holds what a trainable-only checkpoint leaves out; None for a whole one."""
    base = Manifest.read(directory).base
    return None if base is None else resolve_checkpoint(directory / base)


def verify_checkpoint(directory: Path) -> None:
    """Compare the files of a checkpoint and of its bases with their checksums; the ranks share the work. A collective.

    Raises:
        CheckpointError: on every rank: a file is missing or damaged; the message offers the checkpoint before.
    """
    current: Path | None = directory
    while current is not None:
        error: ValueError | OSError | None = None
        try:
            verify_files(current, Manifest.read(current).files, dist.get_rank(), dist.get_world_size())
        except (ValueError, OSError) as caught:
            error = caught
        raise_together(error, f"use {current}{earlier_checkpoint(current)}")
        current = base_of(current)


def _load_model(directory: Path, stages: list[RossStage]) -> None:
    """Weights of a checkpoint: its base's first, then its own."""
    with _explained(directory):
        index = check_loadable(directory)  # names a missing or short file, which Megatron does not, and refuses code
    chunks = merged_model_state(stages)
    request = without_tied_copy(chunks)
    base = base_of(directory)
    if base is not None:
        _load_model(base, stages)
        held = index.state_dict_metadata.keys()
        request = {
            chunk: {name: value for name, value in state.items() if value.key in held}
            for chunk, state in request.items()
        }
    state = with_tied_copy(chunks, _load(request, directory))
    for chunk, stage in enumerate(stages):
        load_model_state(stage, state.get(f"model{chunk}", {}), partial=base is not None)


def load_checkpoint(
    path: Path,
    stages: list[RossStage],
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
) -> tuple[Manifest, dict[str, Any]]:
    """Load weights and optimizer; returns the manifest and what was saved as `progress`.

    Checkpoints of earlier versions hold a learning-rate schedule, too. It is not read: the settings of the run that
    starts say what its schedule is.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint holds weights only.
    """
    directory = resolve_checkpoint(path)
    _load_model(directory, stages)
    model_state = merged_model_state(stages)
    optimizer_state = optimizer_sharded_state(optimizer, model_state, groups.dp, is_loading=True)
    state = _load({"optimizer": optimizer_state}, directory)
    if "progress" not in state:
        raise CheckpointError(f"{directory} holds weights only; start from it with init_from instead of load")
    # A rank that trains nothing asked for no optimizer state, and got none.
    load_optimizer_state(optimizer, model_state, state.get("optimizer", {}), state["progress"]["num_updates"])
    return Manifest.read(directory), state["progress"]


def _load(request: ShardedStateDict, directory: Path) -> dict[str, Any]:
    """From a checkpoint that `_load_model` has checked."""
    with _explained(directory):
        return dist_checkpointing.load(request, str(directory), strict=StrictHandling.RAISE_UNEXPECTED)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Whatever is wrong with a checkpoint becomes a CheckpointError that offers the one before."""
    try:
        yield
    except (CheckpointingException, CheckpointException, UnpicklingError, ValueError) as error:
        reason = " ".join(str(error).split())[:600]
        raise CheckpointError(f"cannot load checkpoint {directory}: {reason}{earlier_checkpoint(directory)}") from error
