"""Plans as a table to read and as JSON to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_ross.planner.search import Plan

_GIB = 2**30
_HEADER = (
    "rank  TP  PP VPP   DP  mbs  recompute  ms/step  samples/s   MFU  bubble  "
    "GiB = params + grads + optim + activ + work + reserve   layout"
)


def table(plans: Sequence[Plan], *, first_rank: int = 1) -> str:
    """One line per plan; memory of the rank that needs most."""
    return "\n".join([_HEADER, *(_line(plan, rank) for rank, plan in enumerate(plans, first_rank))])


def _line(plan: Plan, rank: int) -> str:
    parallel, m = plan.run.parallel, plan.peak_memory
    parts = [m.parameters, m.gradients, m.optimizer, m.activations, m.workspace, m.reserve]
    memory = f"{m.total / _GIB:5.1f} = " + " + ".join(f"{part / _GIB:.1f}" for part in parts)
    fits = "" if plan.fits else "  DOES NOT FIT"
    return (
        f"{rank:>4}  {parallel.tensor_model_parallel_size:>2}  {parallel.pipeline_model_parallel_size:>2} "
        f"{plan.layout.virtual_pipeline_model_parallel_size or 1:>3}  {plan.data_parallel_size:>3}  "
        f"{plan.run.data.micro_batch_size:>3}  {plan.run.compute.recompute_granularity or 'none':<9}  "
        f"{plan.time.total * 1e3:>7.0f}  {plan.samples_per_second:>9.1f}  {plan.mfu:>4.0%}  {plan.time.bubble:>6.1%}  "
        f"{memory:<53} {plan.layout}{fits}"
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """A plan as JSON types: settings to put into a configuration, then predictions."""
    parallel, compute = plan.run.parallel, plan.run.compute
    return {
        "settings": {
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
            "sequence_parallel": parallel.sequence_parallel,
            "layout": str(plan.layout),
            "micro_batch_size": plan.run.data.micro_batch_size,
            "recompute_granularity": compute.recompute_granularity,
            "recompute_method": compute.recompute_method,
            "recompute_num_layers": compute.recompute_num_layers,
        },
        "data_parallel_size": plan.data_parallel_size,
        "num_microbatches": plan.num_microbatches,
        "step_seconds": plan.time.total,
        "step_seconds_by_part": asdict(plan.time),
        "samples_per_second": plan.samples_per_second,
        "mfu": plan.mfu,
        "fits": plan.fits,
        "memory_bytes_by_pipeline_rank": [asdict(memory) | {"total": memory.total} for memory in plan.memory],
    }
