"""Floating-point operations of every module, forward and backward, from counts of tokens, pairs and images.

A matrix product of [m, k] and [k, n] is 2mkn. Backward is counted only where it happens: the input's gradient where
something before it is trained, the weight's gradient where the weight is. Neither element-wise work nor recomputation
counts: these are the operations that the model needs, the numerator of MFU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from megatron_ross.config.model import DenoiserConfig, LanguageModelConfig, RossModelConfig, VaeConfig, VisionConfig
from megatron_ross.config.schema import TrainabilityConfig
from megatron_ross.planner.workload import Work


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass and of the backward pass that follows it."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class Trained:
    """Which parts are trained, and what follows for the gradients of activations."""

    tower: bool
    projector: bool
    language: bool
    denoiser: bool

    @classmethod
    def of(cls, trainability: TrainabilityConfig) -> Trained:
        return cls(
            tower=trainability.unfreeze_mm_vision_tower,
            projector=not trainability.freeze_mm_mlp_adapter,
            language=not trainability.freeze_language_model,
            denoiser=not trainability.freeze_mm_inv_projector,
        )

    @property
    def hidden(self) -> bool:
        """Hidden states of the language model need a gradient."""
        return self.tower or self.projector or self.language


def matmul(m: float, k: float, n: float, *, input_grad: bool, weight_grad: bool) -> Flops:
    """A linear layer on m rows, k to n features."""
    forward = 2 * m * k * n
    return Flops(forward, forward * (input_grad + weight_grad))


def attention(pairs: float, width: float, *, grad: bool) -> Flops:
    """Scores and weighted values over (query, key) pairs; `width` is heads x head size."""
    forward = 4 * pairs * width
    return Flops(forward, 2 * forward * grad)


def tower_flops(config: VisionConfig, images: float, trained: Trained) -> Flops:
    """Patch embedding and the blocks that are run; none after the selected hidden state."""
    hf, width = config.hf_config, config.hidden_size
    grads = {"input_grad": trained.tower, "weight_grad": trained.tower}
    tokens = config.num_image_tokens + (config.model_type == "clip_vision_model")  # the class token
    patch = matmul(
        config.num_image_tokens, 3 * config.patch_size**2, width, input_grad=False, weight_grad=trained.tower
    )
    block = matmul(tokens, width, 4 * width + 2 * hf["intermediate_size"], **grads)
    block += attention(tokens**2, width, grad=trained.tower)
    return (patch + block * num_tower_blocks(config)) * images


def num_tower_blocks(config: VisionConfig) -> int:
    """Blocks before the selected hidden state (state 0 is the input of the first block)."""
    return config.select_layer % (config.hf_config["num_hidden_layers"] + 1)


def projector_widths(model: RossModelConfig) -> list[int]:
    """Feature sizes along the projector: [d_vision, d_llm, ...]; one entry for `identity`."""
    hidden = model.language.hidden_size
    if model.projector.type == "identity":
        return [hidden]
    depth = re.fullmatch(r"mlp(\d+)x_gelu", model.projector.type)
    return [model.vision.hidden_size] + [hidden] * (int(depth[1]) if depth else 1)


def projector_flops(model: RossModelConfig, images: float, trained: Trained) -> Flops:
    widths = projector_widths(model)
    result, rows = Flops(), images * model.vision.num_image_tokens
    for index, (k, n) in enumerate(pairwise(widths)):
        input_grad = trained.tower or (trained.projector and index > 0)
        result += matmul(rows, k, n, input_grad=input_grad, weight_grad=trained.projector)
    return result


def decoder_layer_flops(config: LanguageModelConfig, tokens: float, pairs: float, trained: Trained) -> Flops:
    """One decoder layer: q, k, v, attention, output projection, gated MLP."""
    h, heads = config.hidden_size, config.num_attention_heads * config.kv_channels
    groups = config.num_query_groups * config.kv_channels
    outputs = heads + 2 * groups + heads + 3 * config.ffn_hidden_size
    linear = matmul(tokens, h, outputs, input_grad=trained.hidden, weight_grad=trained.language)
    return linear + attention(pairs, heads, grad=trained.hidden)


def head_flops(config: LanguageModelConfig, supervised_tokens: float, trained: Trained) -> Flops:
    """The LM head, at supervised positions only."""
    return matmul(
        supervised_tokens,
        config.hidden_size,
        config.vocab_size,
        input_grad=trained.hidden,
        weight_grad=trained.language,
    )


def denoiser_flops(model: RossModelConfig, images: float, num_draws: int, trained: Trained) -> Flops:
    """K draws per image through the denoiser; the condition is embedded once per image."""
    if model.denoiser is None:
        return Flops()
    config, latent = model.denoiser, latent_channels(model)
    tokens, draws, width = model.vision.num_image_tokens, images * num_draws, config.width
    inner = {"input_grad": trained.denoiser or trained.hidden, "weight_grad": trained.denoiser}
    first = {"input_grad": False, "weight_grad": trained.denoiser}
    condition = matmul(
        images * tokens,
        model.language.hidden_size,
        width,
        input_grad=trained.hidden,
        weight_grad=trained.denoiser,
    )
    time = matmul(draws, config.frequency_embedding_size, width, **first)
    time += matmul(draws, width, width, input_grad=trained.denoiser, weight_grad=trained.denoiser)
    rows = draws * tokens
    ends = matmul(rows, latent, width, **first) + matmul(rows, width, 2 * width + latent, **inner)
    return condition + time + ends + _denoiser_block(config, rows, tokens, inner) * config.depth


def _denoiser_block(config: DenoiserConfig, rows: float, tokens: int, grads: dict[str, bool]) -> Flops:
    """Modulation 6, qkv 3, output 1 and MLP 2 x ratio, all in units of width x width."""
    width = config.width
    linear = matmul(rows, width, 10 * width + 2 * int(width * config.mlp_ratio), **grads)
    return linear + attention(rows * tokens, width, grad=grads["input_grad"])


def latent_channels(model: RossModelConfig) -> int:
    """Channels of a grouped latent: 2x2 windows of the VAE's."""
    return 4 * model.vae.latent_channels if model.vae is not None else 0


def vae_encoder_flops(config: VaeConfig, image_size: int, images: float) -> Flops:
    """The frozen encoder on square images of `image_size` pixels: convolutions and one attention, forward only."""
    hf = config.hf_config
    widths, latent = hf["block_out_channels"], 2 * hf["latent_channels"]
    side, total, previous = image_size, 2.0 * image_size**2 * 9 * 3 * widths[0], widths[0]
    for level, width in enumerate(widths):
        for index in range(hf["layers_per_block"]):
            total += side**2 * _residual_flops(previous if index == 0 else width, width)
        previous = width
        if level < len(widths) - 1:
            side //= 2
            total += 2 * side**2 * 9 * width * width
    pixels = side**2
    total += pixels * 2 * _residual_flops(previous, previous)
    if hf.get("mid_block_add_attention", True):
        total += 8 * pixels * previous**2 + 4 * pixels**2 * previous
    total += 2 * pixels * 9 * previous * latent
    total += 2 * pixels * latent**2 * hf.get("use_quant_conv", True)
    return Flops(total * images, 0.0)


def _residual_flops(channels_in: int, channels_out: int) -> float:
    """Per pixel: two 3x3 convolutions, and a 1x1 shortcut where the width changes."""
    shortcut = channels_in * channels_out if channels_in != channels_out else 0
    return 2 * (9 * channels_in * channels_out + 9 * channels_out**2 + shortcut)


def module_flops(
    model: RossModelConfig, trained: Trained, work: Work, num_draws: int, *, cached_latents: bool = False
) -> dict[str, Flops]:
    """Operations by module: tower, projector, decoder (all layers), head, denoiser, vae (0 with cached latents)."""
    layer = decoder_layer_flops(model.language, work.tokens, work.attention_pairs, trained)
    result = {
        "tower": tower_flops(model.vision, work.images, trained),
        "projector": projector_flops(model, work.images, trained),
        "decoder": layer * model.language.num_layers,
        "head": head_flops(model.language, work.supervised_tokens, trained),
    }
    if model.vae is not None:
        reconstructed = work.reconstructed_images if num_draws else 0.0
        result["denoiser"] = denoiser_flops(model, reconstructed, num_draws, trained)
        encoded = 0.0 if cached_latents else reconstructed
        result["vae"] = vae_encoder_flops(model.vae, model.decode_image_size, encoded)
    return result


def step_flops(
    model: RossModelConfig,
    trainability: TrainabilityConfig,
    work: Work,
    num_draws: int,
    *,
    cached_latents: bool = False,
) -> float:
    """Operations of one optimizer step over the whole global batch, for the metric MFU.

    Args:
        work: counts of the step, summed over microbatches and data-parallel ranks (`Work`, `causal_pairs`).
        num_draws: passes of every image through the denoiser (K); 0 if the reconstruction loss has no weight.
        cached_latents: the VAE does not run.
    """
    parts = module_flops(model, Trained.of(trainability), work, num_draws, cached_latents=cached_latents)
    return sum(part.total for part in parts.values())


def mfu(flops: float, seconds: float, world_size: int, peak_flops_per_gpu: float) -> float:
    """Model FLOPs utilisation: share of the GPUs' peak that useful operations took."""
    return flops / (seconds * world_size * peak_flops_per_gpu)
