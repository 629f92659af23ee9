"""Megatron's torch_dist format, written by the training process itself.

Megatron's own strategy forks a process per file even for a synchronous save. A fork copies the memory of a process but
none of its threads, and training has many: gloo's or NCCL's, decoders of images, DALI's. Children that inherit a locked
mutex or a half-made runtime die or stop, and Megatron then waits for them for ever (seen with DALI's CPU pipelines).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_ross.checkpoint.reader import COMMON_NAME


def begin_write(
    state: ShardedStateDict, directory: Path, group: dist.ProcessGroup | None, *, copy: bool
) -> Callable[[], None]:
    """Check the state, write what is not sharded, and return the function that writes the rest; a collective call.

    The function writes this rank's main replicas to one file, and last, on rank 0, `.metadata`. It is called by all
    ranks, and raises CheckpointException on rank 0, with the faults of all ranks, and on the ranks at fault.
    `dist_checkpointing.save` would write other files from megatron-core 0.19 on: there is no `common.pt` any more.

    Args:
        group: for the collectives of the function, which may run in a thread; None: the default group.
        copy: the function writes a copy, in CPU memory, of what the state holds now.
    Raises:
        CheckpointingException: the ranks' shards do not make up whole tensors.
        OSError: `common.pt` cannot be written.
    """
    sharded, common = save_preprocess(state)
    if dist.get_rank() == 0:
        torch.save(common, directory / COMMON_NAME)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    if copy:
        for tensor in (value for values in by_key.values() for value in values if isinstance(value, ShardedTensor)):
            tensor.data = tensor.data.detach().to("cpu", copy=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    return functools.partial(_write, mcore_to_pyt_state_dict(by_key, False), planner, directory, group)


def _write(state: dict[str, Any], planner: SavePlanner, directory: Path, group: dist.ProcessGroup | None) -> None:
    dcp.save(state, storage_writer=_Writer(directory), planner=planner, process_group=group)


class _Writer(dcp.FileSystemWriter):
    """Torch's writer with one thread, because it loses the errors of all others, and with errors that say why."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=True, thread_count=1)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Raises OSError where the disk refused: torch.save hides it behind 'unexpected pos' of its zip writer."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise _disk_error(error) or error from None


def _disk_error(error: BaseException | None) -> OSError | None:
    """The OSError in whose handling `error` was raised."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
