"""Layouts that fit: what one setting costs, and all settings ranked by predicted step time."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ross.config.cli import ConfigError
from megatron_ross.config.layout import StageLayout
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.planner.activations import ActivationModel, Shapes
from megatron_ross.planner.auto import resolve_layout
from megatron_ross.planner.flops import mfu, step_flops
from megatron_ross.planner.hardware import Gpu
from megatron_ross.planner.memory import Memory, rank_memory
from megatron_ross.planner.timing import CostModel, StepTime, step_time
from megatron_ross.planner.workload import Workload, default_workload

VIRTUAL_SIZES = (None, 2, 4)
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Plan:
    """One setting and its predictions."""

    run: RunConfig
    layout: StageLayout
    world_size: int
    gpu: Gpu
    num_microbatches: int
    samples_per_step: float
    memory: tuple[Memory, ...]
    """Of every pipeline rank."""
    time: StepTime
    mfu: float
    """Useful operations over the bf16 peak; recomputation and padding do not count as useful."""

    @property
    def data_parallel_size(self) -> int:
        parallel = self.run.parallel
        return self.world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)

    @property
    def peak_memory(self) -> Memory:
        """Of the rank that needs most."""
        return max(self.memory, key=lambda m: m.total)

    @property
    def fits(self) -> bool:
        return self.peak_memory.total <= self.gpu.memory_gib * 2**30

    @property
    def samples_per_second(self) -> float:
        return self.samples_per_step / self.time.total


def plan_run(
    run: RunConfig, model: RossModelConfig, world_size: int, gpu: Gpu, workload: Workload | None = None
) -> Plan:
    """Predictions for a run as it is configured.

    Raises:
        ConfigError: sizes that do not go together.
    """
    workload = workload or default_workload(run)
    parallel, data = run.parallel, run.data
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    dp = world_size // ranks
    if world_size % ranks or data.global_batch_size % (data.micro_batch_size * dp):
        raise ConfigError(
            f"world size {world_size}: tensor x pipeline size {ranks} must divide it, and micro_batch_size "
            f"{data.micro_batch_size} x data-parallel size must divide global_batch_size {data.global_batch_size}"
        )
    num_microbatches = data.global_batch_size // (data.micro_batch_size * dp)
    layout = resolve_layout(run, model, world_size, gpu, workload)
    costs = CostModel(model, run, gpu, workload)
    work = costs.microbatch
    shapes = Shapes(costs.computed_tokens, work.supervised_tokens, work.images, work.reconstructed_images)
    activations = ActivationModel(model, run, shapes)
    memory = tuple(
        rank_memory(activations, layout, pp_rank=rank, dp_size=dp, num_microbatches=num_microbatches)
        for rank in range(layout.pipeline_model_parallel_size)
    )
    time = step_time(costs, layout, world_size, [int(m.gradients) // 4 for m in memory], num_microbatches)
    whole_step = work * (num_microbatches * dp)
    flops = step_flops(
        model,
        run.trainability,
        whole_step,
        run.loss.denoiser_passes,
        cached_latents=bool(run.data.latent_cache),
    )
    utilisation = mfu(flops, time.total, world_size, gpu.peak_flops("bf16"))
    samples = data.global_batch_size * workload.samples_per_sequence(model, run)
    return Plan(run, layout, world_size, gpu, num_microbatches, samples, memory, time, utilisation)


def longest_sample(plan: Plan, model: RossModelConfig) -> int:
    """Most tokens per sample, one image included, that the plan's GPU has room for when every sample is as long.

    Means say nothing about that: a run ends at its longest microbatch, and `group_by_modality_length` puts samples of
    equal length together. At most seq_length; 0 if an image alone does not fit.
    """
    run = replace(plan.run, parallel=replace(plan.run.parallel, layout=str(plan.layout)))  # balanced for mean samples

    def is_too_long(tokens: int) -> bool:
        text = tokens - model.vision.num_image_tokens
        return not plan_run(run, model, plan.world_size, plan.gpu, Workload(text, supervised_tokens=text)).fits

    lengths = range(model.vision.num_image_tokens, run.data.seq_length + 1)
    fitting = bisect.bisect_left(lengths, True, key=is_too_long)
    return lengths[fitting - 1] if fitting else 0


def candidates(run: RunConfig, model: RossModelConfig, world_size: int, gpu: Gpu) -> Iterator[RunConfig]:
    """Settings of (TP, PP, VPP, microbatch, recomputation) whose sizes go together, layouts balanced by cost."""
    language, batch = model.language, run.data.global_batch_size
    for tp, pp in itertools.product(_divisors(world_size), repeat=2):
        if world_size % (tp * pp) or tp > gpu.gpus_per_node:
            continue
        if any(n % tp for n in (language.num_attention_heads, language.num_query_groups, language.ffn_hidden_size)):
            continue
        dp = world_size // (tp * pp)
        for virtual, size in itertools.product(VIRTUAL_SIZES, MICRO_BATCH_SIZES):
            if pp * (virtual or 1) > language.num_layers or batch % (size * dp):
                continue
            if virtual is not None and (pp == 1 or batch // (size * dp) % pp):
                continue
            parallel = replace(
                run.parallel,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=virtual,
                sequence_parallel=tp > 1,
                layout="auto",
                overlap_p2p_comm=None,
                batch_p2p_comm=None,
            )
            for granularity, method, layers in ((None, None, None), ("full", "uniform", 1)):
                compute = replace(
                    run.compute,
                    recompute_granularity=granularity,  # type: ignore[arg-type]
                    recompute_method=method,  # type: ignore[arg-type]
                    recompute_num_layers=layers,
                )
                yield replace(run, parallel=parallel, compute=compute, data=replace(run.data, micro_batch_size=size))


def search(
    run: RunConfig, model: RossModelConfig, world_size: int, gpu: Gpu, workload: Workload | None = None
) -> list[Plan]:
    """All plans that fit the GPU's memory, fastest first; of equally fast ones the one that needs less memory.

    Raises:
        ConfigError: nothing fits; the message says how far the closest setting is.
    """
    plans = [plan_run(setting, model, world_size, gpu, workload) for setting in candidates(run, model, world_size, gpu)]
    if not plans:
        raise ConfigError(
            f"global_batch_size={run.data.global_batch_size}: cannot be divided over {world_size} GPUs; change either"
        )
    feasible = [plan for plan in plans if plan.fits]
    if not feasible:
        closest = min(plans, key=lambda plan: plan.peak_memory.total).peak_memory.total / 2**30
        raise ConfigError(
            f"gpu={gpu.name!r}: nothing fits {gpu.memory_gib:g} GiB, the smallest setting needs {closest:.0f} GiB; "
            "use more GPUs or a smaller model"
        )
    return sorted(feasible, key=lambda plan: (round(plan.time.total, 4), plan.peak_memory.total))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
