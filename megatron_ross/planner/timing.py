"""Predicted seconds of a step: operations over shares of the GPU's peaks, plus communication.

The shares were measured in one run on one H200; what is assumed of links and memory stands in this file, too.
Predictions are only as good: use them to compare layouts, and measure the few that look best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_ross.config.layout import StageLayout, StageSpec
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.planner.flops import Flops, Trained, decoder_layer_flops, module_flops
from megatron_ross.planner.hardware import Gpu
from megatron_ross.planner.workload import Work, Workload, images_on_busiest_rank

EFFICIENCY = {"decoder": 0.58, "head": 0.23, "projector": 0.88, "tower": 0.20, "denoiser": 0.27, "vae": 0.22}
"""Share of the peak rate of its dtype that each module reaches: benchmarks/results/step_2_deep_h200.json."""
LAUNCH_SECONDS = 100e-6
"""A decoder layer's forward pass takes at least this long: some 25 kernels."""
LINK_EFFICIENCY = 0.7
MEMORY_EFFICIENCY = 0.8
_OPTIMIZER_BYTES = 34
"""Read and written per element of a shard: main weight and two moments twice, gradient, and the model's own copy."""


@dataclass(frozen=True)
class Seconds:
    """Time of a forward and of a backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class CostModel:
    """Times of a model's parts in a run on a GPU; a microbatch holds mean samples of `workload`."""

    model: RossModelConfig
    run: RunConfig
    gpu: Gpu
    workload: Workload

    @property
    def tp(self) -> int:
        return self.run.parallel.tensor_model_parallel_size

    @property
    def microbatch(self) -> Work:
        """Real counts of one microbatch; no token is supervised where the language loss has no weight."""
        data = self.run.data
        samples = data.micro_batch_size * self.workload.samples_per_sequence(self.model, self.run)
        work = self.workload.work(self.model, data.seq_length, samples)
        return work if self.run.loss.supervises_text else replace(work, supervised_tokens=0.0)

    @property
    def computed_tokens(self) -> float:
        """Tokens of a microbatch with padding."""
        return self.microbatch.tokens * self.workload.padding

    def letters(self) -> dict[str, Seconds]:
        """Time of every letter of a layout for one microbatch on one rank; `t` is one layer."""
        work, trained, padding = self.microbatch, Trained.of(self.run.trainability), self.workload.padding
        flops = module_flops(
            self.model, trained, work, self.run.loss.denoiser_passes, cached_latents=bool(self.run.data.latent_cache)
        )
        layer = decoder_layer_flops(self.model.language, work.tokens, work.attention_pairs, trained) * padding
        images = self._share(work.images)
        reconstructed = self._share(work.reconstructed_images)
        result = {
            "V": self._time("tower", flops["tower"] * images) + self._time("projector", flops["projector"] * images),
            "t": self._with_recompute(
                _at_least(LAUNCH_SECONDS, self._time("decoder", layer * (1 / self.tp))) + self._tensor_parallel()
            ),
            "H": self._head(self._time("head", flops["head"] * (1 / self.tp))),
            "E": Seconds(),
            "N": Seconds(),
            "D": Seconds(),
        }
        if "denoiser" in flops:
            denoiser = self._time("denoiser", flops["denoiser"] * reconstructed)
            result["D"] = denoiser + self._time("vae", flops["vae"] * reconstructed)
        return result

    def stage(self, spec: StageSpec, letters: dict[str, Seconds]) -> Seconds:
        """A stage's time for one microbatch; `letters` from `letters()`."""
        return sum((letters[letter] for letter in spec.letters), start=Seconds())

    def _share(self, images: float) -> float:
        """Part of a microbatch's images that the busiest tensor-parallel rank handles."""
        return images_on_busiest_rank(images, self.tp) / images if images else 0.0

    def _dtype(self, module: str) -> str:
        compute = self.run.compute
        tower = compute.vision_tower_dtype or ("bf16" if compute.bf16 else "fp32")
        if not compute.bf16:
            return tower if module == "tower" else "fp32"
        return {"denoiser": compute.denoiser_dtype, "vae": "tf32", "tower": tower}.get(module, "bf16")

    def _time(self, module: str, flops: Flops) -> Seconds:
        rate = self.gpu.peak_flops(self._dtype(module)) * EFFICIENCY[module]
        return Seconds(flops.forward / rate, flops.backward / rate)

    def _with_recompute(self, layer: Seconds) -> Seconds:
        repeats = self.run.compute.recompute_granularity == "full" and layer.backward > 0
        return Seconds(layer.forward, layer.backward + layer.forward * repeats)

    def _head(self, whole: Seconds) -> Seconds:
        """A chunked LM head computes its logits twice."""
        repeats = self.microbatch.supervised_tokens > self.run.compute.lm_head_chunk_tokens
        return Seconds(whole.forward, whole.backward + whole.forward * repeats)

    def _tensor_parallel(self) -> Seconds:
        """Two all-reduces each way per layer (or reduce-scatter and all-gather: the same bytes)."""
        if self.tp == 1:
            return Seconds()
        size = self.computed_tokens * self.model.language.hidden_size * (2 if self.run.compute.bf16 else 4)
        seconds = 2 * 2 * (self.tp - 1) / self.tp * size / (self.link(self.tp) * 1e9 * LINK_EFFICIENCY)
        return Seconds(seconds, seconds * Trained.of(self.run.trainability).hidden)

    def link(self, span: int) -> float:
        """GB/s between ranks of a group that spans this many consecutive GPUs."""
        return self.gpu.nvlink_gb_per_s if span <= self.gpu.gpus_per_node else self.gpu.network_gb_per_s


def _at_least(seconds: float, time: Seconds) -> Seconds:
    """A floor for the forward pass; the backward pass has about twice the kernels."""
    return Seconds(max(time.forward, seconds), max(time.backward, 2 * seconds) if time.backward else 0.0)


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one optimizer step and where they go."""

    pipeline: float
    point_to_point: float
    gradient_exchange: float
    optimizer: float
    bubble: float
    """Share of the pipeline's time in which a rank waits, on average; unequal stages count too."""

    @property
    def total(self) -> float:
        return self.pipeline + self.point_to_point + self.gradient_exchange + self.optimizer


def step_time(
    costs: CostModel, layout: StageLayout, world_size: int, trained_numel: list[int], num_microbatches: int
) -> StepTime:
    """Time of a step.

    Args:
        trained_numel: elements of every pipeline rank's gradient buffers.
    """
    pp = layout.pipeline_model_parallel_size
    letters = costs.letters()
    ranks = [
        sum((costs.stage(spec, letters) for spec in layout.chunks_of_rank(rank)), start=Seconds()) for rank in range(pp)
    ]
    busiest, everything = max(r.total for r in ranks), sum(r.total for r in ranks)
    fill = (everything - busiest) / (layout.virtual_pipeline_model_parallel_size or 1)
    pipeline = num_microbatches * busiest + fill
    dp = world_size // (pp * costs.tp)
    return StepTime(
        pipeline=pipeline,
        point_to_point=_point_to_point(costs, layout, world_size, num_microbatches),
        gradient_exchange=max(
            _gradient_exchange(costs, numel, dp, seconds) for numel, seconds in zip(trained_numel, ranks, strict=True)
        ),
        optimizer=max(trained_numel)
        * (_OPTIMIZER_BYTES / dp + 12)
        / (costs.gpu.memory_gb_per_s * 1e9 * MEMORY_EFFICIENCY),
        bubble=1 - num_microbatches * everything / (pp * pipeline) if pipeline else 0.0,
    )


def _point_to_point(costs: CostModel, layout: StageLayout, world_size: int, num_microbatches: int) -> float:
    """Hidden states to the next stage and gradients back; hidden behind compute in the interleaved schedule."""
    if len(layout.stages) == 1 or layout.virtual_pipeline_model_parallel_size is not None:
        return 0.0
    shards = costs.tp if costs.run.parallel.sequence_parallel else 1
    size = costs.computed_tokens * costs.model.language.hidden_size * (2 if costs.run.compute.bf16 else 4) / shards
    return 2 * num_microbatches * size / (costs.link(world_size) * 1e9 * LINK_EFFICIENCY)


def _gradient_exchange(costs: CostModel, numel: int, dp: int, microbatch: Seconds) -> float:
    """Reduce-scatter of fp32 gradients and all-gather of weights, less what overlaps with one microbatch."""
    if dp == 1:
        return 0.0
    gpu, parallel = costs.gpu, costs.run.parallel
    rate = gpu.nvlink_gb_per_s
    if dp * costs.tp > gpu.gpus_per_node:  # rings use the network adapters of all members on a node
        members = max(1, gpu.gpus_per_node // costs.tp)
        rate = min(rate, gpu.network_gb_per_s * members)
    per_byte = numel * (dp - 1) / dp / (rate * 1e9 * LINK_EFFICIENCY)
    reduce, gather = 4 * per_byte, (2 if costs.run.compute.bf16 else 4) * per_byte
    reduce -= min(reduce, microbatch.backward) if parallel.overlap_grad_reduce else 0.0
    gather -= min(gather, microbatch.forward) if parallel.overlap_param_gather else 0.0
    return reduce + gather
