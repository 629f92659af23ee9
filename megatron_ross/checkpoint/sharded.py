"""Save and load training checkpoints with Megatron's dist checkpointing (torch_dist).

A checkpoint appears under its name only when it is complete: it is written to `iter_N.incomplete`, renamed, and only
then named in `latest_checkpointed_iteration.txt`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ross.checkpoint.manifest import ASSETS_NAME, Manifest, iteration_dir, resolve_checkpoint, write_latest
from megatron_ross.checkpoint.model_state import load_model_state, model_sharded_state
from megatron_ross.checkpoint.optimizer_state import load_optimizer_state, optimizer_sharded_state
from megatron_ross.checkpoint.reader import check_loadable, open_checkpoint, read_index
from megatron_ross.checkpoint.vae import vae_sharded_state
from megatron_ross.checkpoint.writer import InProcessSave
from megatron_ross.models.ross_stage import RossStage
from megatron_ross.parallel.groups import ParallelGroups


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and the reason."""


def _merged_model_state(stages: list[RossStage]) -> ShardedStateDict:
    """Sharded tensors of all this rank's stages, keyed by chunk."""
    return {f"model{chunk}": model_sharded_state(stage) for chunk, stage in enumerate(stages)}


def save_checkpoint(
    root: Path,
    manifest: Manifest,
    assets: Path,
    stages: list[RossStage],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    progress: dict[str, Any],
    groups: ParallelGroups,
    source: Path | None = None,
) -> Path:
    """Write ROOT/iter_N with weights, optimizer, schedule and `progress` (the same plain values on every rank).

    `source` is the checkpoint that frozen weights come from which the run did not load: a VAE whose latents are cached.

    Raises:
        CheckpointError: on every rank, when any rank could not write; nothing of the failed checkpoint remains.
    """
    directory = iteration_dir(root, manifest.iteration)
    partial = directory.with_name(directory.name + ".incomplete")
    model_state = _merged_model_state(stages)
    state = {
        **(model_state | _absent_vae(source, stages) if manifest.base is None else _trainable(model_state)),
        "optimizer": optimizer_sharded_state(optimizer, model_state, groups.dp, is_loading=False),
        "scheduler": scheduler.state_dict(),
        "progress": progress,
    }
    _run_on_rank_0(lambda: _start_folder(partial), f"prepare {partial}")
    error: BaseException | None = None
    try:
        dist_checkpointing.save(state, str(partial), sharded_strategy=InProcessSave())
    except (Exception, CheckpointException) as caught:  # any fault; agreed on below, so no rank is left behind
        error = caught
    _raise_together(error, f"write checkpoint {directory}", cleanup=partial)
    _run_on_rank_0(lambda: _publish(partial, directory, manifest, assets), f"publish checkpoint {directory}")
    return directory


def _absent_vae(source: Path | None, stages: list[RossStage]) -> ShardedStateDict:
    """The VAE's tensors, read from `source` by ranks whose reconstruction loss works without it."""
    if source is None:
        return {}
    state: ShardedStateDict = {}
    error: BaseException | None = None
    try:
        if any(stage.spec.has("D") for stage in stages):
            state["vae"] = vae_sharded_state(open_checkpoint(source), stages[0].groups)
    except (ValueError, OSError) as caught:
        error = caught
    _raise_together(error, f"read the VAE from {source}")
    return state


def _trainable(model_state: ShardedStateDict) -> ShardedStateDict:
    """Only what is trained; frozen weights come from the checkpoint that the manifest names as `base`."""
    return {
        chunk: {name: value for name, value in state.items() if getattr(value.data, "requires_grad", False)}
        for chunk, state in model_state.items()
    }


def _start_folder(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _publish(partial: Path, directory: Path, manifest: Manifest, assets: Path) -> None:
    shutil.copytree(assets, partial / ASSETS_NAME, dirs_exist_ok=True)
    manifest.write(partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    write_latest(directory.parent, manifest.iteration)


def _run_on_rank_0(action, what: str) -> None:
    error = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as caught:
            error = caught
    _raise_together(error, what)


def _raise_together(error: BaseException | None, what: str, cleanup: Path | None = None) -> None:
    """Raise on every rank if any rank has an error, so that none waits in a collective."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if error is None else _reason(error))
    failed = sorted({reason for reason in reasons if reason is not None}, key=len, reverse=True)
    if not failed:
        return
    if cleanup is not None and dist.get_rank() == 0:
        shutil.rmtree(cleanup, ignore_errors=True)
    raise CheckpointError(f"cannot {what}: {failed[0]}; free space or choose another folder, then resume") from error


def _reason(error: BaseException) -> str:
    """One line. The writer reports all ranks' errors to one rank, and nothing to the others."""
    if isinstance(error, CheckpointException):
        causes = [_last_line(failure[0]) for failure in error.failures.values()]
        return causes[0] if causes else ""
    return _last_line(error)


def _last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


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


def _load_model(directory: Path, stages: list[RossStage]) -> None:
    """Weights of a checkpoint: its base's first, then its own."""
    request = _merged_model_state(stages)
    base = base_of(directory)
    if base is not None:
        _load_model(base, stages)
        held = set(read_index(directory).state_dict_metadata)
        request = {
            chunk: {name: value for name, value in state.items() if value.key in held}
            for chunk, state in request.items()
        }
    state = _load(request, directory)
    for chunk, stage in enumerate(stages):
        load_model_state(stage, state.get(f"model{chunk}", {}), partial=base is not None)


def load_checkpoint(
    path: Path,
    stages: list[RossStage],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    groups: ParallelGroups,
) -> tuple[Manifest, dict[str, Any]]:
    """Load weights, optimizer and schedule; returns the manifest and what was saved as `progress`."""
    directory = resolve_checkpoint(path)
    _load_model(directory, stages)
    model_state = _merged_model_state(stages)
    optimizer_state = optimizer_sharded_state(optimizer, model_state, groups.dp, is_loading=True)
    state = _load({"optimizer": optimizer_state}, directory)
    if "progress" not in state:
        raise CheckpointError(f"{directory} holds weights only; start from it with init_from instead of load")
    scheduler.load_state_dict(state["scheduler"])
    # A rank that trains nothing asked for no optimizer state, and got none.
    load_optimizer_state(optimizer, model_state, state.get("optimizer", {}), state["progress"]["num_updates"])
    return Manifest.read(directory), state["progress"]


def _load(request: ShardedStateDict, directory: Path) -> dict[str, Any]:
    check_loadable(directory)
    try:
        return dist_checkpointing.load(request, str(directory), strict=StrictHandling.RAISE_UNEXPECTED)
    except (CheckpointingException, CheckpointException, UnpicklingError) as error:
        raise CheckpointError(f"cannot load checkpoint {directory}: {' '.join(str(error).split())[:600]}") from error
