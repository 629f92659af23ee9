"""Bytes that every rank needs, by category, for the very layout that the model builder reads.

parameters, gradients, optimizer: exact, Megatron's padding included. activations: of the microbatches in flight.
workspace: the largest short-lived tensors. reserve: CUDA context, communication buffers, fragmentation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from megatron_ross.config.layout import StageLayout, StageSpec
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.planner.activations import ActivationModel
from megatron_ross.planner.buffers import bucket_size, build_buffer
from megatron_ross.planner.parameters import stage_parameters
from megatron_ross.planner.workload import images_on_busiest_rank

RESERVE_BYTES = 4 * 2**30
_ADAM_STATE_BYTES = 8
_MAIN_WEIGHT_BYTES = 4
_GRADIENT_BYTES = 4
_BF16_BYTES = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. `frozen` (tower, VAE, a frozen language model) is a part of `parameters`."""

    parameters: float
    frozen: float
    gradients: float
    optimizer: float
    activations: float = 0.0
    workspace: float = 0.0
    reserve: float = 0.0

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.workspace + self.reserve


def state_memory(
    model: RossModelConfig, run: RunConfig, layout: StageLayout, *, pp_rank: int, dp_rank: int, dp_size: int
) -> Memory:
    """Parameters, gradients and optimizer state of one rank, as Megatron allocates them."""
    parallel = run.parallel
    frozen = trained = gradients = optimizer = 0
    for chunk, spec in enumerate(layout.chunks_of_rank(pp_rank)):
        parameters = stage_parameters(model, run, layout, spec)
        limit = bucket_size(
            dp_size,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            pp_rank=pp_rank,
            chunk=chunk,
            asked=parallel.ddp_bucket_size,
        )
        frozen += sum(p.bytes for p in parameters if not p.trainable)
        for width in sorted({p.bytes_per_element for p in parameters}):  # Megatron has a buffer per dtype
            buffer = build_buffer([p for p in parameters if p.bytes_per_element == width], dp_size, limit)
            trained += buffer.numel * width
            gradients += buffer.numel * _GRADIENT_BYTES
            main_weights = _MAIN_WEIGHT_BYTES if width == _BF16_BYTES else 0
            optimizer += buffer.shard_numel(dp_rank, dp_size) * (_ADAM_STATE_BYTES + main_weights)
    return Memory(frozen + trained, frozen, gradients, optimizer)


def chunks_in_flight(pp_rank: int, pp: int, chunks: int, num_microbatches: int) -> list[int]:
    """Microbatches that each chunk of a rank has forwarded and not yet backwarded, at the schedule's fullest."""
    if chunks == 1:
        return [min(num_microbatches, pp - pp_rank)]
    total = min(num_microbatches * chunks, 2 * (pp - pp_rank - 1) + (chunks - 1) * pp + 1)
    counts = Counter((step // pp) % chunks for step in range(total))
    return [counts[chunk] for chunk in range(chunks)]


def rank_memory(
    activations: ActivationModel, layout: StageLayout, *, pp_rank: int, dp_size: int, num_microbatches: int
) -> Memory:
    """All categories of one pipeline rank; its first data-parallel rank stands for the others."""
    pp, specs = layout.pipeline_model_parallel_size, layout.chunks_of_rank(pp_rank)
    state = state_memory(activations.model, activations.run, layout, pp_rank=pp_rank, dp_rank=0, dp_size=dp_size)
    in_flight = chunks_in_flight(pp_rank, pp, len(specs), num_microbatches)
    return replace(
        state,
        activations=sum(n * activations.stage(spec) for n, spec in zip(in_flight, specs, strict=True)),
        workspace=max(_workspace(activations, spec) for spec in specs),
        reserve=RESERVE_BYTES,
    )


def _workspace(activations: ActivationModel, spec: StageSpec) -> float:
    """Layers recomputed for backward, and the largest of: gradients in an MLP, logits, denoiser gradients, VAE."""
    model, shapes, tp = activations.model, activations.shapes, activations.tp
    needs = [0.0]
    if spec.num_layers:
        needs.append(6 * activations.element * shapes.tokens * model.language.ffn_hidden_size / tp)
    if spec.has("H"):
        needs.append(activations.logits_tokens * model.language.vocab_size / tp * (4 + activations.element))
    if spec.has("D") and model.denoiser is not None and model.vae is not None:
        images = images_on_busiest_rank(shapes.reconstructed_images, tp)
        rows = images * model.vision.num_image_tokens * activations.run.loss.denoiser_passes
        needs.append(12 * rows * model.denoiser.width * 4)
        if not activations.run.data.latent_cache:
            needs.append(4 * 4 * images * model.decode_image_size**2 * model.vae.hf_config["block_out_channels"][0])
    return activations.recomputed_at_once(spec.num_layers) + max(needs)
