"""Collect what the ranks hold: parameters and gradients as whole tensors under Hugging Face names, on rank 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_ross.checkpoint.model_state import model_sharded_state
from megatron_ross.checkpoint.optimizer_state import parameter_slices
from megatron_ross.config.model import RossModelConfig
from megatron_ross.convert.layouts import ross_mappings
from megatron_ross.models.ross_stage import RossStage
from megatron_ross.parallel.groups import ParallelGroups

Value = Callable[[nn.Parameter], Tensor | None]


def gather_parameters(stages: list[RossStage], model: RossModelConfig, *, trainable_only: bool) -> dict[str, Tensor]:
    """Whole parameters by Hugging Face name on rank 0, {} elsewhere. A collective call."""
    return gather_values(stages, model, lambda p: p.detach() if p.requires_grad or not trainable_only else None)


def gather_gradients(
    stages: list[RossStage], model: RossModelConfig, optimizer: MegatronOptimizer, groups: ParallelGroups
) -> dict[str, Tensor]:
    """Whole finalised gradients by Hugging Face name on rank 0, {} elsewhere. A collective call."""
    gradients = own_gradients(stages, optimizer, groups)
    return gather_values(stages, model, lambda p: gradients.get(id(p)))


def own_gradients(stages: list[RossStage], optimizer: MegatronOptimizer, groups: ParallelGroups) -> dict[int, Tensor]:
    """Finalised gradients of this rank's trainable parameters, by `id`. A collective call.

    After finalisation each data-parallel rank holds the reduced gradient of its own slice of every buffer only.
    """
    slices = {id(piece.parameter): piece for piece in parameter_slices(optimizer)}
    gradients: dict[int, Tensor] = {}
    for stage in stages:
        for parameter in stage.parameters():
            if not parameter.requires_grad:
                continue
            flat = torch.zeros(parameter.numel(), device=parameter.device)
            if piece := slices.get(id(parameter)):
                flat[piece.start : piece.end] = parameter.main_grad.flatten()[piece.start : piece.end]
            dist.all_reduce(flat, group=groups.dp)
            gradients[id(parameter)] = flat.view(parameter.shape)
    return gradients


def gather_values(stages: list[RossStage], model: RossModelConfig, value: Value) -> dict[str, Tensor]:
    """Whole tensors by Hugging Face name of what `value` gives for each parameter, None leaving it out; on rank 0, {}
    elsewhere. A collective call.
    """
    pieces = [piece for stage in stages for piece in pieces_of(stage, value)]
    everything: list = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(pieces, everything if dist.get_rank() == 0 else None)
    whole: dict[str, Tensor] = {}
    for piece in (piece for part in everything for piece in part):
        whole.setdefault(piece.key, torch.zeros(piece.shape))[piece.place] = piece.data
    return _hugging_face_names(whole, model)


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor: checkpoint key, shape of the whole, offset there, data."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor

    @property
    def place(self) -> tuple[slice, ...]:
        """Where in the whole tensor the data belong."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.data.shape, strict=True))


def pieces_of(stage: RossStage, value: Value, *, replicas: bool = False) -> list[Piece]:
    """Of the tensors for which `value` gives one, float32 on the CPU; main replicas only, unless asked for all."""
    pieces = []
    for entry in nested_values(model_sharded_state(stage)):
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue
        data = value(entry.data)
        if data is None:
            continue
        dtype = {"dtype": data.dtype} if isinstance(entry, ShardedTensor) else {}  # gradients of bf16 weights are fp32
        entry = replace(entry, data=data, **dtype)
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for tensor in nested_values({"value": built}):
            if replicas or not any(_as_tuple(tensor.replica_id)):
                data = tensor.data.float().cpu()
                pieces.append(Piece(tensor.key, tensor.global_shape, tensor.global_offset, data))
    return pieces


def _as_tuple(replica_id) -> tuple[int, ...]:
    return replica_id if isinstance(replica_id, tuple) else (replica_id,)


def _hugging_face_names(whole: dict[str, Tensor], model: RossModelConfig) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for mapping in ross_mappings(model):
        if mapping.key in whole:
            tensor = whole[mapping.key][: mapping.shape[0]]  # without vocabulary padding
            named |= {part.name: t for part, t in zip(mapping.parts, mapping.split(tensor), strict=True)}
    return named
