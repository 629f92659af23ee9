"""config.json of a whole model <-> `RossModelConfig`: the published composite format and stock LLaVA.

A published config has only names for the tower and the auto-encoder. Their configs come, in this order, from the fields
that our exports add (`vision_config`, `vae_config`), a folder the caller gives, a folder inside the checkpoint, or
`known_components`. A name is never followed out of the checkpoint.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_ross.config.json_files import read_json
from megatron_ross.config.model import DenoiserConfig, ProjectorConfig, RossModelConfig, VaeConfig, VisionConfig
from megatron_ross.config.model_limits import MAX_WIDTH
from megatron_ross.config.shown import shown
from megatron_ross.convert.checked_fields import Fields
from megatron_ross.convert.component_config import image_statistics, language_config, vae_config, vision_config
from megatron_ross.convert.hf_io import WeightFolder
from megatron_ross.convert.known_components import FLUX_VAE, KNOWN_TOWERS
from megatron_ross.convert.layouts import ROSS_PREFIXES

DEFAULT_WIDTHS = {8: 1280, 12: 1536}
"""Published denoiser widths by depth; every other depth has 1024."""

_LLAVA_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
}
"""Defaults of the transformers config classes: a nested `text_config` leaves equal fields out."""


def ross_model_config(
    config: dict[str, Any],
    checkpoint_dir: Path,
    *,
    vision_dir: Path | None = None,
    vae_dir: Path | None = None,
) -> RossModelConfig:
    """Model config of a Hugging Face checkpoint (`model_type` ross_qwen2, ross_llama or llava).

    Args:
        config: its config.json.
        checkpoint_dir: its folder.
        vision_dir, vae_dir: folders with the configs of tower and auto-encoder, for published checkpoints that name
            components we do not know.

    Raises:
        ValueError: a field is missing, wrong, out of range or unsupported, or sizes of two parts do not meet.
    """
    where = str(Path(checkpoint_dir) / "config.json")
    if config.get("model_type") == "llava":
        return _llava_config(Fields(config, where), Path(checkpoint_dir))
    fields = Fields(config, where)
    fields.choice("model_type", ("ross_qwen2", "ross_llama", "llava"))
    fields.choice("mm_vision_select_feature", ("patch",), "patch")
    fields.choice("mm_patch_merge_type", ("flat",), "flat")
    for unsupported in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        fields.choice(unsupported, (False,), False)
    vision = _tower(fields, Path(checkpoint_dir), vision_dir)
    denoiser, vae = None, None
    if fields.has("mm_inv_projector_type") and fields.has("mm_pixel_decoder"):
        denoiser = _denoiser(fields, Path(checkpoint_dir))
        vae = _auto_encoder(fields, Path(checkpoint_dir), vae_dir)
    model = RossModelConfig(
        language=language_config(config, where),
        vision=vision,
        projector=ProjectorConfig(fields.text("mm_projector_type", "linear")),
        denoiser=denoiser,
        vae=vae,
    )
    _check_sizes(fields, model)
    return model


def denoiser_config(type_name: str, width: int | None = None, objective: str = "denoise") -> DenoiserConfig:
    """`denoiser_vit{depth}x`, a width (default: the published one for that depth) and an objective -> config.

    Raises:
        ValueError: another type, or a width that the 16 heads do not divide.
    """
    match = re.fullmatch(r"denoiser_vit([1-9]\d?)x", type_name)
    if match is None:
        raise ValueError(f"denoiser type {shown(type_name)} is unknown: use denoiser_vitNx, N = 1..99")
    depth = int(match[1])
    config = DenoiserConfig(depth=depth, width=width or DEFAULT_WIDTHS.get(depth, 1024), objective=objective)
    if config.width % config.num_heads or not 0 < config.width <= MAX_WIDTH:
        raise ValueError(f"denoiser width {config.width} must be a multiple of its {config.num_heads} heads")
    return config


def _tower(fields: Fields, checkpoint_dir: Path, vision_dir: Path | None) -> VisionConfig:
    name = fields.text("mm_vision_tower")
    inside = vision_dir or _inside(checkpoint_dir, name)
    if fields.has("vision_config"):
        values, where = fields.table("vision_config").values, f"{fields.where}, vision_config"
    elif inside is not None:
        values, where = read_json(inside / "config.json"), str(inside / "config.json")
    elif name.rstrip("/").split("/")[-1] in KNOWN_TOWERS:
        values, where = KNOWN_TOWERS[name.rstrip("/").split("/")[-1]], f"built-in config of {name}"
    else:
        raise ValueError(
            f"{fields.where}: the config of tower {name!r} is unknown: give its folder with --vision-tower"
        )
    select_layer = fields.integer("mm_vision_select_layer", -1024, 1024, -2)
    if "siglip" in str(values.get("model_type")):
        select_layer = -2  # as published: fixed for SigLIP, whatever the config says
    ratio = fields.choice("image_aspect_ratio", ("pad", "square"), "square")
    mean, std = _statistics(fields, checkpoint_dir, vision_dir)
    return vision_config(values, where, mean, std, select_layer, ratio, _conversion(fields))


def _conversion(fields: Fields) -> str:
    return fields.choice("image_conversion", ("published", "viewer"), "published")


def _statistics(
    fields: Fields, checkpoint_dir: Path, vision_dir: Path | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if fields.has("image_mean"):
        return image_statistics(fields.values, fields.where)
    for directory in (checkpoint_dir, vision_dir):
        if directory is not None and (directory / "preprocessor_config.json").is_file():
            path = directory / "preprocessor_config.json"
            return image_statistics(read_json(path), str(path))
    raise ValueError(f"{fields.where} has no image_mean and no preprocessor_config.json beside it: give --vision-tower")


def _denoiser(fields: Fields, checkpoint_dir: Path) -> DenoiserConfig:
    width: int | None = None
    if fields.has("mm_inv_projector_width"):
        width = fields.integer("mm_inv_projector_width", 16, MAX_WIDTH)
    else:
        tensors = WeightFolder(checkpoint_dir).tensors
        table = tensors.get(ROSS_PREFIXES["denoiser"] + "pos_embed")
        width = table.shape[-1] if table is not None else None
    try:
        objective = fields.choice("mm_inv_projector_objective", ("denoise", "regress"), "denoise")
        return denoiser_config(fields.text("mm_inv_projector_type"), width, objective)
    except ValueError as error:
        raise ValueError(f"{fields.where}: {error}") from None


def _auto_encoder(fields: Fields, checkpoint_dir: Path, vae_dir: Path | None) -> VaeConfig:
    name = fields.text("mm_pixel_decoder")
    inside = vae_dir or _inside(checkpoint_dir, name)
    if fields.has("vae_config"):
        return vae_config(fields.table("vae_config").values, f"{fields.where}, vae_config")
    if inside is not None:
        return vae_config(read_json(inside / "config.json"), str(inside / "config.json"))
    if "flux" in name.lower():
        return vae_config(FLUX_VAE, "built-in config of the FLUX auto-encoder")
    raise ValueError(f"{fields.where}: the config of auto-encoder {name!r} is unknown: give its folder with --vae")


def _inside(checkpoint_dir: Path, name: str) -> Path | None:
    """The folder `name` inside the checkpoint, if it is one that has a config; never a folder elsewhere."""
    candidate = (checkpoint_dir / name).resolve()
    inside = candidate.is_relative_to(checkpoint_dir.resolve()) and candidate != checkpoint_dir.resolve()
    return candidate if inside and (candidate / "config.json").is_file() else None


def _check_sizes(fields: Fields, model: RossModelConfig) -> None:
    expected = {
        "mm_hidden_size": model.vision.hidden_size,
        "image_embed_len": model.vision.num_image_tokens,
        "mm_inv_hidden_size": model.language.hidden_size,
    }
    if model.vae is not None:
        expected["decode_image_size"] = model.decode_image_size
    for name, size in expected.items():
        if fields.has(name) and fields.integer(name, 0, 1 << 31) != size:
            raise ValueError(f"{fields.where}: {name} is {fields.values[name]}, but the parts make it {size}")


def _llava_config(fields: Fields, checkpoint_dir: Path) -> RossModelConfig:
    """Stock LlavaConfig; image statistics come from the processor's config beside it."""
    text = fields.table("text_config")
    kind = text.choice("model_type", tuple(_LLAVA_TEXT_DEFAULTS))
    text_values = _LLAVA_TEXT_DEFAULTS[kind] | {k: v for k, v in text.values.items() if v is not None}
    if fields.has("tie_word_embeddings") and not text.has("tie_word_embeddings"):
        text_values["tie_word_embeddings"] = fields.boolean("tie_word_embeddings")
    tower = fields.table("vision_config")
    preprocessor = _llava_preprocessor(checkpoint_dir)
    mean, std = image_statistics(preprocessor, str(checkpoint_dir / "preprocessor_config.json"))
    default_ratio = "pad" if preprocessor.get("do_pad") else "square"
    vision = vision_config(
        tower.values,
        tower.where,
        mean,
        std,
        fields.integer("vision_feature_layer", -1024, 1024, -2),
        fields.choice("image_aspect_ratio", ("pad", "square"), default_ratio),
        _conversion(fields),
    )
    strategy = "default" if vision.model_type == "clip_vision_model" else "full"
    fields.choice("vision_feature_select_strategy", (strategy,), "default")
    fields.choice("projector_hidden_act", ("gelu",), "gelu")
    fields.choice("multimodal_projector_bias", (True,), True)
    return RossModelConfig(language_config(text_values, text.where), vision, ProjectorConfig("mlp2x_gelu"))


def _llava_preprocessor(checkpoint_dir: Path) -> dict[str, Any]:
    """Image processor config: preprocessor_config.json, or nested in processor_config.json (transformers 5)."""
    path = checkpoint_dir / "preprocessor_config.json"
    if path.is_file():
        return read_json(path)
    path = checkpoint_dir / "processor_config.json"
    nested = read_json(path).get("image_processor")
    if not isinstance(nested, dict):
        raise ValueError(f"{path} has no image_processor, and there is no preprocessor_config.json")
    return nested
