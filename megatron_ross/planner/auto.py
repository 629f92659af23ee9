"""`layout: auto`: stages balanced by predicted cost instead of by number of layers."""

from __future__ import annotations

from megatron_ross.config.layout import LayoutCosts, StageLayout
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import resolve_layout as resolve_with_costs
from megatron_ross.planner.hardware import GPUS, Gpu
from megatron_ross.planner.timing import CostModel
from megatron_ross.planner.workload import Workload, default_workload

TYPICAL_GPU = GPUS["h100"]
"""Only ratios between dtypes matter for balance, and they are alike on all known GPUs."""


def layout_costs(
    run: RunConfig, model: RossModelConfig, gpu: Gpu = TYPICAL_GPU, workload: Workload | None = None
) -> LayoutCosts:
    """Cost of every part in units of one decoder layer, forward and backward together."""
    letters = CostModel(model, run, gpu, workload or default_workload(run)).letters()
    layer = letters["t"].total
    return LayoutCosts(
        vision=letters["V"].total / layer, denoiser=letters["D"].total / layer, head=letters["H"].total / layer
    )


def resolve_layout(
    run: RunConfig,
    model: RossModelConfig,
    world_size: int,
    gpu: Gpu = TYPICAL_GPU,
    workload: Workload | None = None,
) -> StageLayout:
    """The layout of a run, written out or `auto`.

    Raises:
        ConfigError: the layout, the sizes and the model do not fit together.
    """
    return resolve_with_costs(run, model, world_size, layout_costs(run, model, gpu, workload))
