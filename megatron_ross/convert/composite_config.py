"""config.json of a whole model <-> `RossModelConfig`: the published composite format and stock LLaVA.

A published config has only names for the tower and the auto-encoder. Their configs come, in this order, from the fields
that our exports add (`vision_config`, `vae_config`), a folder the caller gives, a folder inside the checkpoint, and
`known_components`, by name or by the sizes of the stored tensors. A name is never followed out of the checkpoint.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from megatron_ross.config.json_files import read_json
from megatron_ross.config.model import DenoiserConfig, ProjectorConfig, RossModelConfig, VaeConfig, VisionConfig
from megatron_ross.config.model_limits import MAX_WIDTH, RESAMPLE_FILTERS
from megatron_ross.config.shown import shown
from megatron_ross.convert.checked_fields import Fields
from megatron_ross.convert.component_config import image_statistics, language_config, vae_config, vision_config
from megatron_ross.convert.hf_io import TensorInfo, WeightFolder
from megatron_ross.convert.known_components import FLUX_VAE, IMAGE_STATISTICS, KNOWN_TOWERS
from megatron_ross.convert.layouts import ROSS_PREFIXES
from megatron_ross.convert.preprocessor import preprocessed, stored_preprocessor, with_processing
from megatron_ross.convert.read_off import described, known_tower, known_vae, shapes_below, tower_sizes, vae_sizes
from megatron_ross.convert.vae_source import read_vae_config

ORIGINAL_LLAVA = ("llava", "llava_llama", "llava_qwen", "llava_qwen2")
"""`model_type` of checkpoints that LLaVA's own code has written; transformers' class has the first one, too."""

PUBLISHED_SIGLIP_LAYER = -2
"""The published code reads a SigLIP tower here, whatever `mm_vision_select_layer` says."""

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
    """Model config of a Hugging Face checkpoint: published Ross, stock LLaVA, or LLaVA in its original format.

    Args:
        config: its config.json.
        checkpoint_dir: its folder.
        vision_dir, vae_dir: folders with the configs of tower and auto-encoder, for published checkpoints that name
            components we do not know.

    Raises:
        ValueError: a field is missing, wrong, out of range or unsupported, or sizes of two parts do not meet.
    """
    where = str(Path(checkpoint_dir) / "config.json")
    if is_stock_llava(config):
        return _llava_config(Fields(config, where), Path(checkpoint_dir))
    if is_original_llava(config):
        config = config | {"model_type": f"ross_{original_family(config)}"}
    fields = Fields(config, where)
    fields.choice("model_type", ("ross_qwen2", "ross_llama", *ORIGINAL_LLAVA))
    fields.choice("mm_vision_select_feature", ("patch",), "patch")
    fields.choice("mm_patch_merge_type", ("flat",), "flat")
    for unsupported in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        fields.choice(unsupported, (False,), False)
    stored = _Stored(Path(checkpoint_dir))
    vision = _tower(fields, stored, vision_dir)
    denoiser, vae = None, None
    if has_denoiser(config):
        denoiser = _denoiser(fields, stored)
        vae = _auto_encoder(fields, stored, vae_dir)
    model = RossModelConfig(
        language=language_config(config, where),
        vision=vision,
        projector=ProjectorConfig(fields.text("mm_projector_type", "linear")),
        denoiser=denoiser,
        vae=vae,
    )
    _check_sizes(fields, model)
    return model


def is_stock_llava(config: dict[str, Any]) -> bool:
    """config.json of transformers' `LlavaForConditionalGeneration`."""
    return config.get("model_type") == "llava" and config.get("text_config") is not None


def is_original_llava(config: dict[str, Any]) -> bool:
    """config.json of LLaVA's own code, whose layout the published Ross format has taken over."""
    return config.get("model_type") in ORIGINAL_LLAVA and not is_stock_llava(config)


def original_family(config: dict[str, Any]) -> str:
    """Language model family of an original LLaVA; its classes are LlavaLlamaForCausalLM, LlavaQwenForCausalLM, ..."""
    classes = config.get("architectures")
    named = f"{config.get('model_type')} {' '.join(map(str, classes)) if isinstance(classes, list) else ''}"
    return "qwen2" if "qwen" in named.lower() else "llama"


def has_denoiser(config: dict[str, Any]) -> bool:
    """True if the config names a denoiser and an auto-encoder; the published baseline leaves them empty."""
    return bool(config.get("mm_inv_projector_type")) and bool(config.get("mm_pixel_decoder"))


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


class _Stored:
    """A checkpoint's folder and its tensors, whose headers are read when first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @functools.cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return WeightFolder(self.directory).tensors


def _tower(fields: Fields, stored: _Stored, vision_dir: Path | None) -> VisionConfig:
    values, where = _tower_values(fields, stored, vision_dir)
    select_layer = fields.integer("mm_vision_select_layer", -1024, 1024, -2)
    if "siglip" in str(values.get("model_type")):
        # Our exports name another layer in a field that the published code does not know.
        select_layer = fields.integer("vision_feature_layer", -1024, 1024, PUBLISHED_SIGLIP_LAYER)
    ratio = fields.choice("image_aspect_ratio", ("pad", "square"), "square")
    preprocessor = stored_preprocessor(stored.directory) or (stored_preprocessor(vision_dir) if vision_dir else None)
    mean, std = _statistics(fields, preprocessor, values)
    vision = vision_config(values, where, mean, std, select_layer, ratio, _conversion(fields))
    if fields.has("image_resample"):  # our exports, where the processor's file does not tell
        return with_processing(
            vision, fields.choice("image_resample", RESAMPLE_FILTERS), fields.boolean("image_do_center_crop")
        )
    return preprocessed(vision, *preprocessor) if preprocessor is not None else vision


def _tower_values(fields: Fields, stored: _Stored, vision_dir: Path | None) -> tuple[dict[str, Any], str]:
    """The tower's config, and where it is from."""
    name = fields.text("mm_vision_tower")
    inside = vision_dir or _inside(stored.directory, name)
    if fields.has("vision_config"):
        return fields.table("vision_config").values, f"{fields.where}, vision_config"
    if inside is not None:
        return read_json(inside / "config.json"), str(inside / "config.json")
    base_name = name.rstrip("/").split("/")[-1]
    if base_name in KNOWN_TOWERS:
        return KNOWN_TOWERS[base_name], f"built-in config of {name}"
    try:
        sizes = tower_sizes(shapes_below(stored.tensors, ROSS_PREFIXES["vision"]))
        known, found = known_tower(sizes), f"its tensors ({described(sizes)}) are no known tower's"
    except ValueError as error:
        known, found = None, str(error)
    if known is None or "siglip2" in name.lower():  # same sizes as SigLIP, another filter
        raise ValueError(
            f"{fields.where}: the config of tower {name!r} is unknown, and {found}: give its folder or hub id with "
            "--vision-tower"
        )
    return known, f"built-in config of the tower with the sizes of {name}"


def _conversion(fields: Fields) -> str:
    return fields.choice("image_conversion", ("published", "viewer"), "published")


def _statistics(
    fields: Fields, preprocessor: tuple[dict[str, Any], str] | None, tower: dict[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel mean and deviation: of the config, else of the image processor, else of the known tower."""
    if preprocessor is not None and Fields(*preprocessor).has("image_mean"):
        beside = image_statistics(*preprocessor)
        if fields.has("image_mean") and (own := image_statistics(fields.values, fields.where)) != beside:
            raise ValueError(
                f"{fields.where}: image_mean and image_std are {own}, but {preprocessor[1]} has {beside}: "
                "make them equal"
            )
        return beside
    if fields.has("image_mean"):
        return image_statistics(fields.values, fields.where)
    if tower in KNOWN_TOWERS.values():
        return IMAGE_STATISTICS[tower["model_type"]]
    raise ValueError(f"{fields.where} has no image_mean and no preprocessor_config.json beside it: give --vision-tower")


def _denoiser(fields: Fields, stored: _Stored) -> DenoiserConfig:
    width: int | None = None
    if fields.has("mm_inv_projector_width"):
        width = fields.integer("mm_inv_projector_width", 16, MAX_WIDTH)
    else:
        table = stored.tensors.get(ROSS_PREFIXES["denoiser"] + "pos_embed")
        width = table.shape[-1] if table is not None else None
    try:
        objective = fields.choice("mm_inv_projector_objective", ("denoise", "regress"), "denoise")
        return denoiser_config(fields.text("mm_inv_projector_type"), width, objective)
    except ValueError as error:
        raise ValueError(f"{fields.where}: {error}") from None


def _auto_encoder(fields: Fields, stored: _Stored, vae_dir: Path | None) -> VaeConfig:
    name = fields.text("mm_pixel_decoder")
    inside = _inside(stored.directory, name)
    if fields.has("vae_config"):
        return vae_config(fields.table("vae_config").values, f"{fields.where}, vae_config")
    if vae_dir is not None:
        return read_vae_config(vae_dir)
    if inside is not None:
        return vae_config(read_json(inside / "config.json"), str(inside / "config.json"))
    if "flux" in name.lower():
        return vae_config(FLUX_VAE, "built-in config of the FLUX auto-encoder")
    try:
        sizes = vae_sizes(shapes_below(stored.tensors, ROSS_PREFIXES["vae"]))
        known, found = known_vae(sizes), f"its tensors ({described(sizes)}) are not FLUX.1's"
    except ValueError as error:
        known, found = None, str(error)
    if known is None or re.search(r"stable-diffusion|sd3|sd-vae|sdxl", name.lower()):  # SD 3 has FLUX's sizes
        raise ValueError(
            f"{fields.where}: the config of auto-encoder {name!r} is unknown, and {found}; the scaling of its latents "
            "is in no tensor: give its folder or hub id with --vae"
        )
    return vae_config(known, "built-in config of the FLUX auto-encoder")


def _inside(checkpoint_dir: Path, name: str) -> Path | None:
    """The folder `name` inside the checkpoint, if it is one that has a config; never a folder elsewhere."""
    if "\0" in name:  # which pathlib raises for, without a word about where it stands
        return None
    candidate = (checkpoint_dir / name).resolve()
    inside = candidate.is_relative_to(checkpoint_dir.resolve()) and candidate != checkpoint_dir.resolve()
    return candidate if inside and (candidate / "config.json").is_file() else None


def _check_sizes(fields: Fields, model: RossModelConfig) -> None:
    expected = {
        "mm_hidden_size": model.vision.hidden_size,
        "image_embed_len": model.vision.num_image_tokens,
    }
    if model.vae is not None:
        expected["decode_image_size"] = model.decode_image_size
        # Early exports of ours, which have the fields of ours, hold the language model's width.
        early = fields.has("vae_config") and fields.values.get("mm_inv_hidden_size") == model.language.hidden_size
        expected["mm_inv_hidden_size"] = model.language.hidden_size if early else model.vae.denoiser_channels
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
    preprocessor, preprocessor_file = _llava_preprocessor(checkpoint_dir)
    mean, std = image_statistics(preprocessor, preprocessor_file)
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
    vision = preprocessed(vision, preprocessor, preprocessor_file)
    strategy = "default" if vision.model_type == "clip_vision_model" else "full"
    fields.choice("vision_feature_select_strategy", (strategy,), "default")
    fields.choice("projector_hidden_act", ("gelu",), "gelu")
    fields.choice("multimodal_projector_bias", (True,), True)
    return RossModelConfig(language_config(text_values, text.where), vision, ProjectorConfig("mlp2x_gelu"))


def _llava_preprocessor(checkpoint_dir: Path) -> tuple[dict[str, Any], str]:
    found = stored_preprocessor(checkpoint_dir)
    if found is None:
        raise ValueError(
            f"{checkpoint_dir} has no preprocessor_config.json, and no image_processor in processor_config.json"
        )
    return found
