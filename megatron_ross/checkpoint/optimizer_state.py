"""Optimizer state as layout-free sharded tensors: one main weight and two moments per trainable parameter.

The distributed optimizer keeps flat slices of these per data-parallel rank. To save, each parameter's slices are joined
over the data-parallel group, so that the checkpoint looks like the model's and loads into any TP, PP, VPP and DP size.
Ranks without trainable parameters (the middle stages of stage 1) contribute nothing and need nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

_STATE_NAMES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterSlice:
    """What this data-parallel rank holds of one parameter."""

    parameter: nn.Parameter
    start: int
    end: int
    main: Tensor  # flat fp32 slice, the tensor the inner optimizer updates
    state: dict[str, Any]  # inner optimizer's state of `main`


def optimizer_sharded_state(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, dp_group: dist.ProcessGroup, *, is_loading: bool
) -> ShardedStateDict:
    """Sharded tensors `optimizer.state.<name>.<model key>` for this rank's trainable parameters.

    Args:
        model_state: what `model_sharded_state` gave for this rank's stages, merged.
        is_loading: allocate tensors to load into instead of joining the current state.
    """
    by_parameter = {id(_data(value)): value for value in nested_values(model_state)}
    slices = {id(piece.parameter): piece for piece in parameter_slices(optimizer)}
    result: ShardedStateDict = {}
    for parameter in _trainable_parameters(optimizer):
        source = by_parameter[id(parameter)]
        if f"{_STATE_NAMES[0]}.{_local_name(source)}" in result:
            continue  # a tied copy in another chunk of this rank: equal, and loaded from the same tensor
        for name in _STATE_NAMES:
            full = _allocate(parameter) if is_loading else _join(slices.get(id(parameter)), parameter, name, dp_group)
            key = f"optimizer.state.{name}.{source.key}"
            dtype = {} if isinstance(source, ShardedTensorFactory) else {"dtype": torch.float32}
            result[f"{name}.{_local_name(source)}"] = replace(source, key=key, data=full, **dtype)
    return result


def load_optimizer_state(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, loaded: dict[str, Tensor], num_updates: int
) -> None:
    """Cut this rank's slices out of loaded tensors and hand them to the inner optimizer."""
    names = {id(_data(value)): _local_name(value) for value in nested_values(model_state)}
    for piece in parameter_slices(optimizer):
        name = names[id(piece.parameter)]
        main, exp_avg, exp_avg_sq = (
            loaded[f"{kind}.{name}"].flatten()[piece.start : piece.end].to(piece.main.device) for kind in _STATE_NAMES
        )
        piece.main.data.copy_(main)
        piece.state.update(exp_avg=exp_avg.clone(), exp_avg_sq=exp_avg_sq.clone())
    for inner in distributed_optimizers(optimizer):
        _set_num_updates(inner.optimizer, num_updates)


def _set_num_updates(inner: torch.optim.Optimizer, num_updates: int) -> None:
    """torch optimizers count steps per tensor, TransformerEngine's and Apex's per group."""
    if isinstance(inner, torch.optim.AdamW):
        for parameter, state in inner.state.items():
            # A fused kernel reads the count where the parameter is.
            device = parameter.device if inner.defaults["fused"] else None
            state["step"] = torch.tensor(float(num_updates), device=device)
    else:
        for group in inner.param_groups:
            group["step"] = num_updates


def distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers of this rank that have parameters."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o for o in chained if isinstance(o, DistributedOptimizer) and not getattr(o, "is_stub_optimizer", False)]


def _trainable_parameters(optimizer: MegatronOptimizer) -> Iterator[nn.Parameter]:
    """All trainable parameters of this rank's buffers, in one order on all data-parallel ranks."""
    for distributed in distributed_optimizers(optimizer):
        for buffer in distributed.buffers:
            yield from buffer.params


def parameter_slices(optimizer: MegatronOptimizer) -> Iterator[ParameterSlice]:
    """This data-parallel rank's slices of the parameters in Megatron's gradient buffers."""
    for distributed in distributed_optimizers(optimizer):
        for ranges_by_dtype in distributed.gbuf_ranges:
            for buckets in ranges_by_dtype.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        group, order = distributed.model_param_group_index_map[parameter]
                        main = distributed.optimizer.param_groups[group]["params"][order]
                        bounds = ranges["param"]
                        state = distributed.optimizer.state[main]
                        yield ParameterSlice(parameter, bounds.start, bounds.end, main, state)


def _join(piece: ParameterSlice | None, parameter: nn.Parameter, name: str, dp_group: dist.ProcessGroup) -> Tensor:
    """Full fp32 tensor of the parameter's shape on the CPU, from all data-parallel ranks' slices."""
    flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if piece is not None:
        value = piece.main if name == "param" else piece.state.get(name)
        if value is not None:  # before the first update there are no moments
            flat[piece.start : piece.end] = value.detach().flatten().float()
    if dp_group.size() > 1:
        dist.all_reduce(flat, group=dp_group)
    return flat.view(parameter.shape).cpu()


def _allocate(parameter: nn.Parameter) -> Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32)


def _data(value: ShardedTensor | ShardedTensorFactory) -> Any:
    return value.data


def _local_name(value: ShardedTensor | ShardedTensorFactory) -> str:
    return value.key
