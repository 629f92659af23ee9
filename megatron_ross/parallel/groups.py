"""Process groups of a run, made once and passed down."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_ross.config.layout import StageLayout
from megatron_ross.config.schema import ParallelConfig


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's groups. `tied` joins the two ranks that hold copies of tied word embeddings; None where this rank
    holds no copy, or all of them.
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    model_parallel: dist.ProcessGroup
    tied: dist.ProcessGroup | None

    @property
    def is_logging_rank(self) -> bool:
        return dist.get_rank() == dist.get_world_size() - 1


def initialize_groups(
    parallel: ParallelConfig, layout: StageLayout, *, tie_embeddings: bool, seed: int
) -> ParallelGroups:
    """Build Megatron's parallel state on the default process group, which must exist."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,  # Megatron says int, and takes any number
        create_gloo_process_groups=torch.cuda.is_available(),
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ParallelGroups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        model_parallel=parallel_state.get_model_parallel_group(),
        tied=_tied_embedding_group(parallel, layout) if tie_embeddings else None,
    )


def _tied_embedding_group(parallel: ParallelConfig, layout: StageLayout) -> dist.ProcessGroup | None:
    """Group of the two pipeline ranks that hold E and H; None where that is one rank, or not this one."""
    pp_ranks = {rank for letter in "EH" if (rank := layout.pp_rank_of(letter)) is not None}
    if len(pp_ranks) == 1:
        return None
    mine = None
    stride = dist.get_world_size() // parallel.pipeline_model_parallel_size
    for offset in range(stride):
        ranks = sorted(offset + rank * stride for rank in pp_ranks)
        group = dist.new_group(ranks, timeout=timedelta(minutes=parallel.distributed_timeout_minutes))
        if dist.get_rank() in ranks:
            mine = group
    return mine


def destroy_groups() -> None:
    """Undo `initialize_groups`, so that another layout can be built in the same process."""
    parallel_state.destroy_model_parallel()
