"""What is printed before the first step: the stages, their parameters, and how many steps the run really takes."""

from __future__ import annotations

import torch.distributed as dist

from megatron_ross.config.layout import StageLayout
from megatron_ross.models.ross_stage import RossStage
from megatron_ross.parallel.groups import ParallelGroups


def parameter_counts(stages: list[RossStage], groups: ParallelGroups) -> list[tuple[int, int]]:
    """(trainable, total) parameters of every stage of the layout, each parameter once. A collective call."""
    mine: dict[int, tuple[int, int]] = {}
    for stage in stages:
        trainable = total = 0
        for parameter in stage.parameters():
            is_sharded = getattr(parameter, "tensor_model_parallel", False)
            numel = parameter.numel() * (groups.tp.size() if is_sharded else 1)
            total += numel
            trainable += numel if parameter.requires_grad else 0
        mine[stage.spec.index] = (trainable, total)
    gathered: list[dict[int, tuple[int, int]]] = [{} for _ in range(groups.pp.size())]
    dist.all_gather_object(gathered, mine, group=groups.pp)
    merged = {index: counts for part in gathered for index, counts in part.items()}
    return [merged[index] for index in sorted(merged)]


def stage_table(layout: StageLayout, counts: list[tuple[int, int]]) -> str:
    """The layout as a table: stage, pipeline rank, chunk, contents, parameters."""
    pp = layout.pipeline_model_parallel_size
    lines = ["stage  pp rank  chunk  holds                     trainable        total"]
    for stage, (trainable, total) in zip(layout.stages, counts, strict=True):
        lines.append(
            f"{stage.index:>5}  {stage.index % pp:>7}  {stage.index // pp:>5}  {stage!s:<16}"
            f"  {trainable:>17,}  {total:>11,}"
        )
    trainable, total = (sum(values) for values in zip(*counts, strict=True))
    lines.append(f"{'all':>5}  {'':>7}  {'':>5}  {'':<16}  {trainable:>17,}  {total:>11,}")
    return "\n".join(lines)
