"""A stage's weights as Megatron sharded tensors with layout-free names.

The names do not depend on tensor, pipeline or virtual-pipeline size, nor on which layer implementation is used
(docs/checkpoints.md lists them), so any layout reads what any other wrote.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from megatron_ross.models.ross_stage import RossStage
from megatron_ross.parallel.groups import ParallelGroups

_WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
_LM_HEAD = "output_layer.weight"


def model_sharded_state(stage: RossStage) -> ShardedStateDict:
    """Sharded tensors of one stage: the stage's own state-dict names -> tensors with layout-free keys."""
    groups = stage.groups
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.dp}
    state: dict[str, Any] = {}
    if stage.spec.has("V"):
        state |= _replicated(stage.vision.vision_tower.tower, "vision.vision_tower.tower.", "vision.tower.", groups)
        state |= _replicated(stage.vision.projector, "vision.projector.", "vision.projector.", groups)
    if stage.spec.has("E"):
        state |= sharded_state_dict_default(stage.embedding, "embedding.", (), metadata)
    if stage.spec.num_layers:
        state |= sharded_state_dict_default(stage.decoder, "decoder.", (), metadata)
    if stage.spec.has("N"):
        state |= _replicated(stage.final_layernorm, "final_layernorm.", "final_layernorm.", groups)
    if stage.spec.has("D"):
        head = stage.reconstruction
        state |= _replicated(head.denoiser, "reconstruction.denoiser.", "denoiser.", groups)
        if head.latent_encoder is not None:
            state |= _replicated(head.latent_encoder.vae, "reconstruction.latent_encoder.vae.", "vae.", groups)
    if stage.spec.has("H") and stage.output_layer.weight is not None:
        state |= _output_layer(stage, metadata)
    return {name: value for name, value in state.items() if not _is_empty_object(value)}


def _replicated(module: nn.Module, prefix: str, key_prefix: str, groups: ParallelGroups) -> ShardedStateDict:
    """Tensors that every tensor- and data-parallel rank of the stage holds whole."""
    tensors = make_sharded_tensors_for_checkpoint(
        module.state_dict(keep_vars=True), key_prefix, {}, (), tp_group=groups.tp, dp_cp_group=groups.dp
    )
    return {prefix + key.removeprefix(key_prefix): tensor for key, tensor in tensors.items()}


def _output_layer(stage: RossStage, metadata: dict[str, Any]) -> ShardedStateDict:
    """The LM head; its vocabulary padding may differ between layouts. A tied copy goes by the embedding's key."""
    state = stage.output_layer.sharded_state_dict("output_layer.", (), metadata)
    tensor: ShardedTensor = replace(state[_LM_HEAD], allow_shape_mismatch=True)
    if getattr(stage.output_layer.weight, "shared_embedding", False):
        _, tp_rank, dp_rank = tensor.replica_id
        tensor = replace(tensor, key=_WORD_EMBEDDINGS, replica_id=(1, tp_rank, dp_rank))
    return state | {_LM_HEAD: tensor}


def without_tied_copy(chunks: dict[str, ShardedStateDict]) -> dict[str, ShardedStateDict]:
    """A rank's chunks without the LM head's copy of an embedding that another chunk holds: a checkpoint has one key for
    both, and takes it from a rank once.
    """
    holder = _tied_copy(chunks)
    return {
        chunk: {name: value for name, value in state.items() if (chunk, name) != (holder, _LM_HEAD)}
        for chunk, state in chunks.items()
    }


def with_tied_copy(
    chunks: dict[str, ShardedStateDict], loaded: dict[str, dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """What was loaded for `without_tied_copy(chunks)`, with the embedding as LM head where that was left out."""
    holder = _tied_copy(chunks)
    embedding = next((state[_WORD_EMBEDDINGS] for state in loaded.values() if _WORD_EMBEDDINGS in state), None)
    if holder is None or embedding is None:
        return loaded
    return loaded | {holder: loaded.get(holder, {}) | {_LM_HEAD: embedding}}


def _tied_copy(chunks: dict[str, ShardedStateDict]) -> str | None:
    """The chunk with a copy of the embedding as LM head, if another chunk of the rank has the embedding itself."""
    if not any(_WORD_EMBEDDINGS in state for state in chunks.values()):
        return None
    heads = {chunk: state[_LM_HEAD] for chunk, state in chunks.items() if _LM_HEAD in state}
    return next((chunk for chunk, head in heads.items() if head.key == _WORD_EMBEDDINGS), None)


def _is_empty_object(value: Any) -> bool:
    """Local layers declare an extra state they do not have; checkpoints made from Hugging Face weights have none."""
    return isinstance(value, ShardedObject) and (value.data is None or value.key.endswith("_extra_state"))


def load_model_state(stage: RossStage, tensors: dict[str, Tensor], *, partial: bool = False) -> None:
    """Put loaded tensors into the stage; a `partial` set leaves the other weights as they are.

    Raises:
        RuntimeError: a weight of the stage was not loaded.
    """
    missing, unexpected = stage.load_state_dict(tensors, strict=False)
    missing = [] if partial else [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise RuntimeError(f"stage {stage.spec}: weights not loaded {missing}, weights not expected {list(unexpected)}")
