"""Every parameter of a pipeline stage, from the model's configuration and the stage's letters alone.

The order is that of the built module, because Megatron's buffers and the optimizer's shards follow it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from megatron_ross.config.layout import StageLayout, StageSpec
from megatron_ross.config.model import DenoiserConfig, LanguageModelConfig, RossModelConfig, VaeConfig, VisionConfig
from megatron_ross.config.schema import RunConfig, TrainabilityConfig
from megatron_ross.planner.flops import latent_channels, num_tower_blocks, projector_widths


@dataclass(frozen=True)
class Parameter:
    """One tensor as one rank holds it: its part of it under tensor parallelism."""

    part: str  # tower, projector, embedding, decoder, norm, denoiser, vae, head
    numel: int
    trainable: bool
    bytes_per_element: int
    shared_embedding: bool = False
    """A tied weight whose twin is on another stage: Megatron gives it its own bucket."""

    @property
    def bytes(self) -> int:
        return self.numel * self.bytes_per_element


@dataclass(frozen=True)
class _Shape:
    part: str
    shape: tuple[int, ...]
    trainable: bool
    shared_embedding: bool = False


def stage_parameters(model: RossModelConfig, run: RunConfig, layout: StageLayout, spec: StageSpec) -> list[Parameter]:
    """Parameters of one stage on one tensor-parallel rank, in module order."""
    width = 2 if run.compute.bf16 else 4
    tp = run.parallel.tensor_model_parallel_size
    shapes = _stage_shapes(model, run.trainability, layout, spec, tp, supervises_text=run.loss.supervises_text)
    tower = {"bf16": 2, "fp32": 4, "tf32": 4, None: width}[run.compute.vision_tower_dtype]
    widths = {"vae": 4, "tower": tower}
    absent = "vae" if run.data.latent_cache else None
    return [
        Parameter(s.part, prod(s.shape), s.trainable, widths.get(s.part, width), s.shared_embedding)
        for s in shapes
        if s.part != absent
    ]


def _stage_shapes(
    model: RossModelConfig,
    train: TrainabilityConfig,
    layout: StageLayout,
    spec: StageSpec,
    tp: int,
    *,
    supervises_text: bool,
) -> Iterator[_Shape]:
    language, trains_llm = model.language, not train.freeze_language_model
    vocabulary = (-(-language.vocab_size // tp), language.hidden_size)
    tied = language.share_embeddings_and_output_weights
    apart = tied and layout.stage_of("E") != layout.stage_of("H")
    if spec.has("V"):
        yield from tower_shapes(model.vision, train.unfreeze_mm_vision_tower)
        for k, n in pairwise(projector_widths(model)):
            yield from _linear("projector", k, n, not train.freeze_mm_mlp_adapter)
    if spec.has("E"):
        yield _Shape("embedding", vocabulary, trains_llm, apart)
    for _ in range(spec.num_layers):
        yield from decoder_layer_shapes(language, tp, trains_llm)
    if spec.has("N"):
        yield _Shape("norm", (language.hidden_size,), trains_llm)
    if spec.has("D") and model.denoiser is not None and model.vae is not None:
        yield from denoiser_shapes(model, model.denoiser, train)
        yield from vae_shapes(model.vae)
    if spec.has("H") and (apart or not tied):
        yield _Shape("head", vocabulary, trains_llm and (tied or supervises_text), apart)


def _linear(part: str, n_in: int, n_out: int, trainable: bool, *, bias: bool = True) -> Iterator[_Shape]:
    yield _Shape(part, (n_out, n_in), trainable)
    if bias:
        yield _Shape(part, (n_out,), trainable)


def _norm(part: str, width: int, trainable: bool) -> Iterator[_Shape]:
    yield _Shape(part, (width,), trainable)
    yield _Shape(part, (width,), trainable)


def decoder_layer_shapes(config: LanguageModelConfig, tp: int, trainable: bool) -> Iterator[_Shape]:
    """Norm, output projection, qkv, norm, gated MLP; the matrices are split over `tp` ranks."""
    h, heads = config.hidden_size, config.num_attention_heads * config.kv_channels // tp
    qkv = heads + 2 * config.num_query_groups * config.kv_channels // tp
    yield _Shape("decoder", (h,), trainable)
    yield _Shape("decoder", (h, heads), trainable)
    yield from _linear("decoder", h, qkv, trainable, bias=config.add_qkv_bias)
    yield _Shape("decoder", (h,), trainable)
    yield _Shape("decoder", (2 * config.ffn_hidden_size // tp, h), trainable)
    yield _Shape("decoder", (h, config.ffn_hidden_size // tp), trainable)


def tower_shapes(config: VisionConfig, trainable: bool) -> Iterator[_Shape]:
    """The whole Hugging Face tower; only the parts that are run can be trained."""
    width, is_clip = config.hidden_size, config.model_type == "clip_vision_model"
    if is_clip:
        yield _Shape("tower", (width,), trainable)  # class token
    yield _Shape("tower", (width, 3, config.patch_size, config.patch_size), trainable)
    if not is_clip:
        yield _Shape("tower", (width,), trainable)  # bias of the patch embedding
    yield _Shape("tower", (config.num_image_tokens + is_clip, width), trainable)
    if is_clip:
        yield from _norm("tower", width, trainable)
    for index in range(config.hf_config["num_hidden_layers"]):
        yield from _tower_block(config, trainable and index < num_tower_blocks(config))
    yield from _norm("tower", width, False)
    if not is_clip and config.hf_config.get("vision_use_head", True):
        yield from _pooling_head(config)


def _tower_block(config: VisionConfig, trainable: bool) -> Iterator[_Shape]:
    """Attention and MLP; SigLIP's module has each norm before its layer, CLIP's behind it."""
    width, inner = config.hidden_size, config.hf_config["intermediate_size"]
    attention = [shape for _ in "kvqo" for shape in _linear("tower", width, width, trainable)]
    mlp = [*_linear("tower", width, inner, trainable), *_linear("tower", inner, width, trainable)]
    norm = [*_norm("tower", width, trainable)]
    is_clip = config.model_type == "clip_vision_model"
    for layer in (attention, mlp):
        yield from (*layer, *norm) if is_clip else (*norm, *layer)


def _pooling_head(config: VisionConfig) -> Iterator[_Shape]:
    """SigLIP's attention pooling: stored, never run."""
    width, inner = config.hidden_size, config.hf_config["intermediate_size"]
    yield _Shape("tower", (width,), False)
    yield from _linear("tower", width, 3 * width, False)
    yield from _linear("tower", width, width, False)
    yield from _norm("tower", width, False)
    yield from _linear("tower", width, inner, False)
    yield from _linear("tower", inner, width, False)


def denoiser_shapes(model: RossModelConfig, config: DenoiserConfig, train: TrainabilityConfig) -> Iterator[_Shape]:
    """Position table, embeddings, blocks, final layer."""
    width, latent, trains = config.width, latent_channels(model), not train.freeze_mm_inv_projector
    table = train.train_denoiser_position_table
    trains_table = trains and (train.freeze_language_model if table is None else table)
    yield _Shape("denoiser", (model.vision.num_image_tokens, width), trains_table)
    yield from _linear("denoiser", latent, width, trains)
    yield from _linear("denoiser", config.frequency_embedding_size, width, trains)
    yield from _linear("denoiser", width, width, trains)
    yield from _linear("denoiser", model.language.hidden_size, width, trains)
    inner = int(width * config.mlp_ratio)
    for _ in range(config.depth):
        for k, n in ((width, 3 * width), (width, width), (width, inner), (inner, width), (width, 6 * width)):
            yield from _linear("denoiser", k, n, trains)
    yield from _linear("denoiser", width, latent, trains)
    yield from _linear("denoiser", width, 2 * width, trains)


def vae_shapes(config: VaeConfig) -> Iterator[_Shape]:
    """The whole auto-encoder; its decoder is kept for checkpoints and pictures."""
    hf = config.hf_config
    widths, latent, blocks = hf["block_out_channels"], hf["latent_channels"], hf["layers_per_block"]
    yield from _conv(3, widths[0])
    yield from _levels(widths, blocks)
    yield from _middle(widths[-1], hf)
    yield from _norm("vae", widths[-1], False)
    yield from _conv(widths[-1], 2 * latent)
    yield from _conv(latent, widths[-1])
    yield from _middle(widths[-1], hf)
    yield from _levels(widths[::-1], blocks + 1)
    yield from _norm("vae", widths[0], False)
    yield from _conv(widths[0], 3)
    if hf.get("use_quant_conv", True):
        yield from _conv(2 * latent, 2 * latent, kernel=1)
    if hf.get("use_post_quant_conv", True):
        yield from _conv(latent, latent, kernel=1)


def _conv(channels_in: int, channels_out: int, kernel: int = 3) -> Iterator[_Shape]:
    yield _Shape("vae", (channels_out, channels_in, kernel, kernel), False)
    yield _Shape("vae", (channels_out,), False)


def _levels(widths: list[int], num_blocks: int) -> Iterator[_Shape]:
    """Residual blocks of every resolution, with a resampling convolution between resolutions."""
    previous = widths[0]
    for level, width in enumerate(widths):
        for _ in range(num_blocks):
            yield from _residual(previous, width)
            previous = width
        if level < len(widths) - 1:
            yield from _conv(width, width)


def _residual(channels_in: int, channels_out: int) -> Iterator[_Shape]:
    yield from _norm("vae", channels_in, False)
    yield from _conv(channels_in, channels_out)
    yield from _norm("vae", channels_out, False)
    yield from _conv(channels_out, channels_out)
    if channels_in != channels_out:
        yield from _conv(channels_in, channels_out, kernel=1)


def _middle(width: int, hf: dict[str, Any]) -> Iterator[_Shape]:
    yield from _residual(width, width)
    if hf.get("mid_block_add_attention", True):
        yield from _norm("vae", width, False)
        for _ in "qkvo":
            yield from _linear("vae", width, width, False)
    yield from _residual(width, width)
