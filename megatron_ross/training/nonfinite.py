"""Which samples made a loss or gradient NaN or Inf: one line of RUN/nonfinite.jsonl for every such step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ross.data.batch import RossMicrobatch
from megatron_ross.data.run_files import RunFiles
from megatron_ross.models.ross_stage import RossStage

FILE_NAME = "nonfinite.jsonl"


def nonfinite_microbatches(stages: list[RossStage], batches: list[RossMicrobatch]) -> list[dict[str, Any]]:
    """Microbatches of all ranks whose loss was not finite in the last step. A collective call.

    If all losses are finite, only gradients are not: then every microbatch of the step is named, without a loss.
    """
    mine = [
        {"rank": dist.get_rank(), "loss": loss, "microbatch": i, "sample_ids": batches[i].sample_ids}
        for stage in stages
        for loss, i in stage.losses.nonfinite()
    ]
    found = _gather(mine)
    if found:
        return found
    all_of_them = [
        {"rank": dist.get_rank(), "loss": None, "microbatch": i, "sample_ids": batch.sample_ids}
        for i, batch in enumerate(batches)
    ]
    return _gather(all_of_them)


def _gather(mine: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lists: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, mine)
    return [entry for entries in lists for entry in entries]


def samples_of(found: list[dict[str, Any]]) -> list[int]:
    """Sample ids of these microbatches, each once."""
    return sorted({sample for entry in found for sample in entry["sample_ids"]})


def write_nonfinite(files: RunFiles, folder: Path, record: dict[str, Any]) -> None:
    """Append a line."""
    files.append(folder / FILE_NAME, json.dumps(record) + "\n")
