"""What a stored model description may say, checked before anything is built from it.

A manifest is JSON that anyone may have written: its numbers decide how much is allocated. Values are checked one by one
and by name; that the parts fit together is found out by whoever builds them.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_ross.config.model import (
    DenoiserConfig,
    LanguageModelConfig,
    ProjectorConfig,
    RossModelConfig,
    VaeConfig,
    VisionConfig,
)
from megatron_ross.config.shown import shown

MAX_WIDTH = 131072
MAX_LAYERS = 1024
MAX_VOCABULARY = 4_000_000
MAX_HEADS = 4096
MAX_HEAD_WIDTH = 4096
MAX_POSITIONS = 1 << 30
MAX_IMAGE_SIZE = 8192
MAX_PATCH_SIZE = 512

Bounds = tuple[float, float]

ROPE_TYPES = ("default", "linear", "llama3")
RESAMPLE_FILTERS = ("bilinear", "bicubic", "lanczos")

_LANGUAGE: dict[str, Bounds] = {
    "num_layers": (1, MAX_LAYERS),
    "hidden_size": (1, MAX_WIDTH),
    "ffn_hidden_size": (1, 8 * MAX_WIDTH),
    "num_attention_heads": (1, MAX_HEADS),
    "num_query_groups": (1, MAX_HEADS),
    "kv_channels": (1, MAX_HEAD_WIDTH),
    "vocab_size": (1, MAX_VOCABULARY),
    "max_position_embeddings": (1, MAX_POSITIONS),
}
_VISION: dict[str, Bounds] = {
    "hidden_size": (1, MAX_WIDTH),
    "intermediate_size": (1, 8 * MAX_WIDTH),
    "num_hidden_layers": (1, MAX_LAYERS),
    "num_attention_heads": (1, MAX_HEADS),
    "num_channels": (1, 16),
    "image_size": (1, MAX_IMAGE_SIZE),
    "patch_size": (1, MAX_PATCH_SIZE),
    "projection_dim": (0, MAX_WIDTH),
}
_VAE: dict[str, Bounds] = {
    "layers_per_block": (1, 16),
    "latent_channels": (1, 1024),
    "in_channels": (1, 16),
    "out_channels": (1, 16),
    "norm_num_groups": (1, 1024),
}
_NAMES_OF_CODE = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""What transformers may take as the name of a module in a checkpoint, or of a kernel on the model hub."""

_LLAMA3_CONSTANTS = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
_MAX_BLOCKS = 16
_MAX_BLOCK_WIDTH = 16384


def check_model(model: RossModelConfig) -> None:
    """Every number of a description has the right type and lies within bounds.

    Raises:
        ValueError: the first that does not, by name.
    """
    _check_language(model.language)
    _check_vision(model.vision)
    _check_projector(model.projector)
    if model.denoiser is not None:
        _check_denoiser(model.denoiser)
    if model.vae is not None:
        _check_vae(model.vae)


def _check_language(language: LanguageModelConfig) -> None:
    _text("language.family", language.family)
    for name, bounds in _LANGUAGE.items():
        _integer(f"language.{name}", getattr(language, name), *bounds)
    _number("language.rotary_base", language.rotary_base, 1, 1e12)
    _number("language.layernorm_epsilon", language.layernorm_epsilon, 0, 1)
    _number("language.init_method_std", language.init_method_std, 0, 10)
    for name in ("add_qkv_bias", "share_embeddings_and_output_weights"):
        if not isinstance(getattr(language, name), bool):
            raise _wrong(f"language.{name}", getattr(language, name), "true or false")
    if language.rope_scaling is not None:
        check_rope_scaling("language.rope_scaling", language.rope_scaling)


def check_rope_scaling(where: str, scaling: Any) -> None:
    """Rotary position scaling asks for nothing that the model code does not have. Raises ValueError.

    Megatron Core takes a factor only; the other constants of llama3 scaling are fixed in its code.
    """
    kind = _table(where, scaling).get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise _wrong(f"{where}.rope_type", kind, "one of " + ", ".join(map(repr, ROPE_TYPES)))
    if kind != "default":
        _number(f"{where}.factor", scaling.get("factor"), 1e-6, 1e6)
    fixed = {"partial_rotary_factor": 1} | (_LLAMA3_CONSTANTS if kind == "llama3" else {})
    without_effect = ("rope_type", "type", "factor", *(_LLAMA3_CONSTANTS if kind != "llama3" else ()))
    for name, value in scaling.items():
        if name in without_effect or value is None:
            continue
        if name not in fixed:
            raise ValueError(
                f"{where}.{shown(name)} is {shown(value)}: {kind} scaling with it is not implemented; use a model "
                "without it"
            )
        if isinstance(value, bool) or value != fixed[name]:
            raise _wrong(f"{where}.{name}", value, f"{fixed[name]}: other values are not implemented")


def _check_vision(vision: VisionConfig) -> None:
    values = _table("vision.hf_config", vision.hf_config)
    _text("vision.hf_config.model_type", values.get("model_type"))
    for name in values:
        if name in _NAMES_OF_CODE:
            raise ValueError(f"vision.hf_config.{name} may name code to fetch and run, and is refused; take it out")
    for name, bounds in _VISION.items():
        if name in values:
            _integer(f"vision.hf_config.{name}", values[name], *bounds)
    for name in ("layer_norm_eps", "attention_dropout"):
        if name in values:
            _number(f"vision.hf_config.{name}", values[name], 0, 1)
    for name in ("image_mean", "image_std"):
        channels = getattr(vision, name)
        if len(channels) != 3:
            raise _wrong(f"vision.{name}", channels, "three numbers")
        for channel in channels:
            _number(f"vision.{name}", channel, -10, 10)
    _integer("vision.select_layer", vision.select_layer, -MAX_LAYERS, MAX_LAYERS)
    if vision.image_aspect_ratio not in ("pad", "square"):
        raise _wrong("vision.image_aspect_ratio", vision.image_aspect_ratio, "'pad' or 'square'")
    if vision.resample not in RESAMPLE_FILTERS:
        raise _wrong("vision.resample", vision.resample, "one of " + ", ".join(map(repr, RESAMPLE_FILTERS)))
    if not isinstance(vision.do_center_crop, bool | None):
        raise _wrong("vision.do_center_crop", vision.do_center_crop, "true, false or null")
    if vision.image_conversion not in ("viewer", "published"):
        raise _wrong("vision.image_conversion", vision.image_conversion, "'viewer' or 'published'")


def _check_projector(projector: ProjectorConfig) -> None:
    _text("projector.type", projector.type)
    if len(projector.type) > len("mlp9x_gelu"):
        raise _wrong("projector.type", projector.type, "identity, linear or mlpNx_gelu (N = 1..9)")


def _check_denoiser(denoiser: DenoiserConfig) -> None:
    _integer("denoiser.depth", denoiser.depth, 1, MAX_LAYERS)
    _integer("denoiser.width", denoiser.width, 1, MAX_WIDTH)
    _integer("denoiser.num_heads", denoiser.num_heads, 1, MAX_HEADS)
    _number("denoiser.mlp_ratio", denoiser.mlp_ratio, 0.01, 64)
    _integer("denoiser.frequency_embedding_size", denoiser.frequency_embedding_size, 2, MAX_WIDTH)
    if denoiser.objective not in ("denoise", "regress"):
        raise _wrong("denoiser.objective", denoiser.objective, "denoise or regress")


def _check_vae(vae: VaeConfig) -> None:
    values = _table("vae.hf_config", vae.hf_config)
    for name, bounds in _VAE.items():
        if name in values:
            _integer(f"vae.hf_config.{name}", values[name], *bounds)
    for name, low in (("scaling_factor", 1e-6), ("shift_factor", -1e6)):
        if values.get(name) is not None:
            _number(f"vae.hf_config.{name}", values[name], low, 1e6)
    widths = values.get("block_out_channels", [])
    if not isinstance(widths, list) or len(widths) > _MAX_BLOCKS:
        raise _wrong("vae.hf_config.block_out_channels", widths, f"a list of at most {_MAX_BLOCKS} widths")
    for width in widths:
        _integer("vae.hf_config.block_out_channels", width, 1, _MAX_BLOCK_WIDTH)


def _integer(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(name, value, f"an integer from {low} to {high}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or not math.isfinite(value):
        raise _wrong(name, value, f"a number from {low:g} to {high:g}")


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise _wrong(name, value, "a text")


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    return value


def _wrong(name: str, value: Any, rule: str) -> ValueError:
    return ValueError(f"{name} is {shown(value)}, it must be {rule}")
