"""What a training checkpoint holds: weights, optimizer and progress, as one sharded state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer

from megatron_ross.checkpoint.agreement import raise_together
from megatron_ross.checkpoint.model_state import model_sharded_state, without_tied_copy
from megatron_ross.checkpoint.optimizer_state import optimizer_sharded_state
from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.checkpoint.vae import vae_sharded_state
from megatron_ross.models.ross_stage import RossStage
from megatron_ross.parallel.groups import ParallelGroups


def merged_model_state(stages: list[RossStage]) -> ShardedStateDict:
    """Sharded tensors of all this rank's stages, keyed by chunk; a tied copy in another chunk has the same key."""
    return {f"model{chunk}": model_sharded_state(stage) for chunk, stage in enumerate(stages)}


def training_state(
    stages: list[RossStage],
    optimizer: MegatronOptimizer,
    progress: dict[str, Any],
    groups: ParallelGroups,
    *,
    trainable_only: bool = False,
    source: Path | None = None,
) -> ShardedStateDict:
    """State for `CheckpointSaver.save`; `progress` holds the same plain values on every rank. A collective call.

    Args:
        trainable_only: leave frozen weights out; the checkpoint that the manifest names as `base` has them.
        source: the checkpoint with frozen weights that the run did not load: a VAE whose latents are cached.

    Raises:
        CheckpointError: on every rank, when any rank could not read `source`.
    """
    model_state = merged_model_state(stages)
    stored = without_tied_copy(model_state)
    return {
        **(_trainable(stored) if trainable_only else stored | _absent_vae(source, stages)),
        "optimizer": optimizer_sharded_state(optimizer, model_state, groups.dp, is_loading=False),
        "progress": progress,
    }


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
    raise_together(error, f"read the VAE from {source}")
    return state


def _trainable(model_state: ShardedStateDict) -> ShardedStateDict:
    return {
        chunk: {name: value for name, value in state.items() if getattr(value.data, "requires_grad", False)}
        for chunk, state in model_state.items()
    }
