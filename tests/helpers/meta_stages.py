"""Stages at full size without memory: on the meta device, in process groups of any size that never send anything."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.parallel.groups import destroy_groups, initialize_groups
from megatron_ross.planner.auto import resolve_layout
from megatron_ross.platform import ensure_platform
from megatron_ross.training.build import build_stages

META = torch.device("meta")
_ASKS_FOR_DEVICE = ("vision_encoder", "layer_specs", "ross_stage", "reconstruction")

Sizes = list[tuple[int, bool, int]]
"""(elements, trainable, bytes per element) of parameters in module order."""


def built_sizes(run: RunConfig, model: RossModelConfig, world_size: int, rank: int) -> list[Sizes]:
    """Parameters of the stages that training builds on this rank, by stage.

    Call it in a process of its own: it replaces the default process group.
    """
    ensure_platform()
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    layout = resolve_layout(run, model, world_size)
    tie = model.language.share_embeddings_and_output_weights
    groups = initialize_groups(run.parallel, layout, tie_embeddings=tie, seed=1)
    with ExitStack() as stack:
        stack.enter_context(META)
        for name in (
            *(f"megatron_ross.models.{m}.current_device" for m in _ASKS_FOR_DEVICE),
            "torch.cuda.current_device",
        ):
            stack.enter_context(mock.patch(name, return_value=META))
        stages = build_stages(model, run, layout, groups)
    destroy_groups()
    parameters = [list(stage.parameters()) for stage in stages]
    assert all(p.device == META for stage in parameters for p in stage)
    return [[(p.numel(), p.requires_grad, p.element_size()) for p in stage] for stage in parameters]
