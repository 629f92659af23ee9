"""Bytes that autograd keeps of one microbatch until its backward pass, by module, on one rank.

Counted tensor by tensor for the layers as they are built from local modules; weights that are frozen keep fewer inputs.
Norms run in fp32. TransformerEngine's fused layers keep less, so these are upper bounds for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ross.config.layout import StageSpec
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.planner.flops import Trained, latent_channels, num_tower_blocks, projector_widths
from megatron_ross.planner.workload import images_on_busiest_rank


@dataclass(frozen=True)
class Shapes:
    """A microbatch as it is computed: `tokens` with padding, `supervised_tokens`, `images` of the whole microbatch."""

    tokens: float
    supervised_tokens: float
    images: float
    reconstructed_images: float


@dataclass(frozen=True)
class ActivationModel:
    """Activation bytes of a model in a run; `fused_activation` is Megatron's fused SwiGLU, which GPUs use."""

    model: RossModelConfig
    run: RunConfig
    shapes: Shapes
    fused_activation: bool = True

    @property
    def trained(self) -> Trained:
        return Trained.of(self.run.trainability)

    @property
    def element(self) -> int:
        """Bytes of an activation outside the denoiser."""
        return 2 if self.run.compute.bf16 else 4

    @property
    def tp(self) -> int:
        return self.run.parallel.tensor_model_parallel_size

    @property
    def hidden_state(self) -> float:
        """[s, b, h], or the rank's part of it under sequence parallelism."""
        parallel = self.run.parallel
        shards = self.tp if parallel.sequence_parallel else 1
        return self.element * self.shapes.tokens * self.model.language.hidden_size / shards

    def stage(self, spec: StageSpec) -> float:
        """All that a stage keeps of one microbatch."""
        total = 0.0 if spec.has("V") else self.hidden_state
        total += self.vision() if spec.has("V") else 0.0
        total += self.decoder(spec.num_layers)
        total += self.norm() if spec.has("N") else 0.0
        total += self.head() if spec.has("H") else 0.0
        total += self.denoiser() if spec.has("D") else 0.0
        return total

    def norm(self) -> float:
        """An RMS norm: its input in fp32, and the normed values where its weight is trained."""
        if not self.trained.hidden:
            return 0.0
        return self.hidden_state * (4 / self.element + self.trained.language)

    def decoder_layer(self) -> float:
        """One layer without recomputation."""
        if not self.trained.hidden:
            return 0.0
        language, tokens, trained = self.model.language, self.shapes.tokens, self.trained.language
        heads = language.num_attention_heads * language.kv_channels
        groups = language.num_query_groups * language.kv_channels
        # q, k, v as projected; q and k after rotation; the output. Then fp32 log-sum-exp per head.
        attention = self.element * (heads + 2 * groups + heads + groups + heads) + 4 * language.num_attention_heads
        gates = 2 if self.fused_activation else 4
        mlp = self.element * language.ffn_hidden_size * (gates + trained)
        inputs_of_linears = 2 * self.hidden_state * trained
        return 2 * self.norm() + inputs_of_linears + tokens * (attention + mlp) / self.tp

    def decoder(self, num_layers: int) -> float:
        """All layers of a stage under the run's recomputation."""
        compute = self.run.compute
        if compute.recompute_granularity != "full":
            return num_layers * self.decoder_layer()
        group = compute.recompute_num_layers or 1
        if compute.recompute_method == "block":
            kept = min(group, num_layers)
            return kept * self.hidden_state + (num_layers - kept) * self.decoder_layer()
        return math.ceil(num_layers / group) * self.hidden_state

    def recomputed_at_once(self, num_layers: int) -> float:
        """What appears again for a moment during backward."""
        compute = self.run.compute
        if compute.recompute_granularity != "full":
            return 0.0
        group = 1 if compute.recompute_method == "block" else compute.recompute_num_layers or 1
        return min(group, num_layers) * self.decoder_layer()

    def vision(self) -> float:
        """Projector, and the tower where it is trained."""
        images = images_on_busiest_rank(self.shapes.images, self.tp)
        widths, trained = projector_widths(self.model), self.trained
        if not (trained.projector or trained.tower):
            return 0.0
        inputs = sum(widths[:-1]) * trained.projector + sum(widths[1:-1])
        tokens = images * self.model.vision.num_image_tokens
        placed = self.shapes.images * self.model.vision.num_image_tokens * widths[-1]
        tower = num_tower_blocks(self.model.vision) * self._tower_block() * trained.tower
        return self.element * (tokens * inputs + placed) + images * tower

    def _tower_block(self) -> float:
        """Two norms with inputs and outputs, q, k, v, attention output, and both sides of the MLP's GELU."""
        vision = self.model.vision
        per_token = 8 * vision.hidden_size + 2 * vision.hf_config["intermediate_size"]
        return self.element * vision.num_image_tokens * per_token

    @property
    def head_is_chunked(self) -> bool:
        """The LM head makes its logits chunk by chunk, and again in backward."""
        return self.shapes.supervised_tokens > self.run.compute.lm_head_chunk_tokens

    @property
    def logits_tokens(self) -> float:
        """Supervised positions whose logits exist at the same time."""
        return min(self.shapes.supervised_tokens, self.run.compute.lm_head_chunk_tokens)

    def head(self) -> float:
        """Supervised rows, and their softmax in fp32 or, chunked, their log-sum-exp, label and position."""
        language = self.model.language
        rows = self.element * language.hidden_size * (self.trained.language or self.head_is_chunked)
        scores = 4 + 8 if self.head_is_chunked else 4 * language.vocab_size / self.tp
        return self.shapes.supervised_tokens * (rows + scores)

    def denoiser(self) -> float:
        """Blocks, final layer, condition, and the copies of bf16 weights that an fp32 denoiser computes with."""
        config, trained = self.model.denoiser, self.trained
        if config is None or not (trained.denoiser or trained.hidden):
            return 0.0
        size = 2 if self.run.compute.denoiser_dtype == "bf16" else 4
        images = images_on_busiest_rank(self.shapes.reconstructed_images, self.tp)
        tokens = images * self.model.vision.num_image_tokens
        rows = tokens * self.run.loss.denoiser_passes
        # Per block: 14 around modulation and gates, 7 in attention and the MLP's input and output, 2 in its middle.
        block = (21 + 2 * config.mlp_ratio) * config.width * size + 4 * config.num_heads
        latents = latent_channels(self.model) * (size + 4)
        condition = size * self.model.language.hidden_size * (2 + trained.denoiser)
        copies = size * denoiser_weights(self.model) if size != self.element and images else 0.0
        return rows * (config.depth * block + 6 * size * config.width + latents) + tokens * condition + copies


def denoiser_weights(model: RossModelConfig) -> int:
    """Elements of the denoiser's matrices."""
    config = model.denoiser
    if config is None:
        return 0
    width, block = config.width, 10 + 2 * config.mlp_ratio
    ends = 2 * latent_channels(model) + model.language.hidden_size + config.frequency_embedding_size
    return int(width * (width * (config.depth * block + 3) + ends))
