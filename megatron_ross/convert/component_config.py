"""Hugging Face configs of the single components -> our config dataclasses.

What the model code cannot do (another activation, biases, sliding windows, unknown rope scaling) is refused here, by
name, before anything is allocated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ross.config.json_files import read_json
from megatron_ross.config.model import LanguageModelConfig, VaeConfig, VisionConfig
from megatron_ross.config.model_limits import (
    MAX_HEAD_WIDTH,
    MAX_HEADS,
    MAX_IMAGE_SIZE,
    MAX_LAYERS,
    MAX_PATCH_SIZE,
    MAX_POSITIONS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    ROPE_TYPES,
    check_rope_scaling,
)
from megatron_ross.config.shown import shown
from megatron_ross.convert.checked_fields import Fields
from megatron_ross.convert.preprocessor import preprocessed

LANGUAGE_FAMILIES = {"qwen2": "qwen2", "llama": "llama", "ross_qwen2": "qwen2", "ross_llama": "llama"}
"""`model_type` -> family."""

_ROPE_DEFAULT_BASE = 10000.0
_TOWER_DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
    },
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    },
}
"""Defaults of the transformers config classes: files may leave these fields out."""

_TOWER_TYPES = {
    "siglip": "siglip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
    "clip": "clip_vision_model",
    "clip_vision_model": "clip_vision_model",
}


def language_config(values: dict[str, Any], where: str) -> LanguageModelConfig:
    """LLM config (qwen2, llama, or the LLM fields of a composite) -> ours.

    Raises:
        ValueError: a field is missing, out of range, or asks for something the model code does not have.
    """
    fields = Fields(values, where)
    family = LANGUAGE_FAMILIES[fields.choice("model_type", tuple(LANGUAGE_FAMILIES))]
    fields.choice("hidden_act", ("silu",), "silu")
    for unsupported in ("attention_bias", "mlp_bias", "use_sliding_window"):
        fields.choice(unsupported, (False,), False)
    fields.choice("partial_rotary_factor", (1,), 1)
    hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
    heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    groups = fields.integer("num_key_value_heads", 1, heads, heads)
    if heads % groups or (not fields.has("head_dim") and hidden % heads):
        raise ValueError(f"{where}: {heads} heads do not fit {groups} key/value heads and hidden_size {hidden}")
    rotary_base, rope_scaling = _rope(fields)
    return LanguageModelConfig(
        family=family,
        num_layers=fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=fields.integer("intermediate_size", 1, 8 * MAX_WIDTH),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=fields.integer("head_dim", 1, MAX_HEAD_WIDTH, hidden // heads),
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCABULARY),
        max_position_embeddings=fields.integer("max_position_embeddings", 1, MAX_POSITIONS),
        rotary_base=rotary_base,
        layernorm_epsilon=fields.number("rms_norm_eps", 0, 1),
        add_qkv_bias=family == "qwen2",
        share_embeddings_and_output_weights=fields.boolean("tie_word_embeddings", False),
        rope_scaling=rope_scaling,
        init_method_std=fields.number("initializer_range", 0, 10, 0.02),
    )


def _rope(fields: Fields) -> tuple[float, dict[str, Any] | None]:
    """Base frequency and scaling, from `rope_theta` + `rope_scaling` or transformers 5's `rope_parameters`."""
    name = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    scaling = dict(fields.table(name).values) if fields.has(name) else {}
    base = Fields(scaling, f"{fields.where}, {name}").number("rope_theta", 1, 1e12, _ROPE_DEFAULT_BASE)
    base = fields.number("rope_theta", 1, 1e12, base)
    scaling.pop("rope_theta", None)
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind or "default")
    Fields(scaling, f"{fields.where}, {name}").choice("rope_type", ROPE_TYPES)
    check_rope_scaling(f"{fields.where}, {name}", scaling)
    return base, scaling if scaling["rope_type"] != "default" else None


def vision_config(
    values: dict[str, Any],
    where: str,
    image_mean: tuple[float, ...],
    image_std: tuple[float, ...],
    select_layer: int = -2,
    image_aspect_ratio: str = "pad",
    image_conversion: str = "published",
) -> VisionConfig:
    """Config of a SigLIP or CLIP tower, alone or nested in the config of the full model -> ours.

    Raises:
        ValueError: a field is out of range, or the tower is of another kind (SigLIP2 NaFlex, SwiGLU towers, ...).
    """
    fields = Fields(values, where)
    tower_type = _TOWER_TYPES[fields.choice("model_type", tuple(_TOWER_TYPES))]
    if fields.has("vision_config"):
        fields = fields.table("vision_config")
    hf = _TOWER_DEFAULTS[tower_type] | {k: v for k, v in fields.values.items() if k in _TOWER_DEFAULTS[tower_type]}
    if fields.values.get("vision_use_head") is False:
        hf["vision_use_head"] = False
    checked = Fields(hf, fields.where)
    for name, high in (("hidden_size", MAX_WIDTH), ("intermediate_size", MAX_WIDTH), ("num_hidden_layers", MAX_LAYERS)):
        checked.integer(name, 1, high)
    image, patch = checked.integer("image_size", 1, MAX_IMAGE_SIZE), checked.integer("patch_size", 1, MAX_PATCH_SIZE)
    heads = checked.integer("num_attention_heads", 1, 1024)
    checked.choice("num_channels", (3,))
    checked.choice("hidden_act", ("gelu_pytorch_tanh", "quick_gelu", "gelu"))
    checked.number("layer_norm_eps", 0, 1)
    if patch > image or hf["hidden_size"] % heads:
        raise ValueError(
            f"{where}: patch {patch} and {heads} heads do not fit image {image}, width {hf['hidden_size']}"
        )
    if not -hf["num_hidden_layers"] - 1 <= select_layer <= hf["num_hidden_layers"]:
        raise ValueError(f"{where}: there is no layer {select_layer} among {hf['num_hidden_layers']}")
    return VisionConfig(
        hf_config={"model_type": tower_type, **hf},
        image_mean=image_mean,  # type: ignore[arg-type]
        image_std=image_std,  # type: ignore[arg-type]
        select_layer=select_layer,
        image_aspect_ratio=image_aspect_ratio,
        image_conversion=image_conversion,
    )


def image_statistics(preprocessor: dict[str, Any], where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel mean and standard deviation of an image processor's config."""
    fields = Fields(preprocessor, where)
    return fields.numbers("image_mean", 3, -10, 10), fields.numbers("image_std", 3, 1e-6, 10)


def tower_config(directory: Path) -> VisionConfig:
    """Config of the tower in `directory` (config.json and preprocessor_config.json)."""
    path, config = directory / "preprocessor_config.json", directory / "config.json"
    preprocessor = read_json(path)
    mean, std = image_statistics(preprocessor, str(path))
    return preprocessed(vision_config(read_json(config), str(config), mean, std), preprocessor, str(path))


def vae_config(values: dict[str, Any], where: str) -> VaeConfig:
    """diffusers AutoencoderKL config -> ours.

    Raises:
        ValueError: another class of auto-encoder, or a field is missing or out of range.
    """
    fields = Fields(values, where)
    fields.choice("_class_name", ("AutoencoderKL",))
    widths = fields.values.get("block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= 16:
        raise ValueError(f"{where}: block_out_channels is {shown(widths)}, it must be a list of widths")
    blocks = Fields({str(index): width for index, width in enumerate(widths)}, f"{where}, block_out_channels")
    for index in range(len(widths)):
        blocks.integer(str(index), 1, 16384)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if fields.values.get(name) != [kind] * len(widths):
            raise ValueError(f"{where}: {name} must be {len(widths)} x {kind}")
    fields.integer("layers_per_block", 1, 16)
    fields.integer("latent_channels", 1, 1024)
    fields.choice("in_channels", (3,))
    fields.choice("out_channels", (3,))
    fields.integer("norm_num_groups", 1, 1024, 32)
    fields.number("scaling_factor", 1e-6, 1e6)
    if fields.has("shift_factor"):
        fields.number("shift_factor", -1e6, 1e6)
    return VaeConfig(hf_config={key: values[key] for key in sorted(values) if not key.startswith("_name")})


def vae_folder_config(directory: Path) -> VaeConfig:
    """Config of the auto-encoder in `directory`."""
    path = directory / "config.json"
    return vae_config(read_json(path), str(path))
