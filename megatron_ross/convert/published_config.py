"""config.json of the published composite format, from a manifest.

A checkpoint that came from a composite keeps its config unchanged. One that came from components gets the language
model's fields plus those that the published code adds. Both get three fields of ours (`vision_config`, `vae_config`,
`mm_inv_projector_width`), which the published code ignores and which make the folder self-contained. A denoiser that
regresses latents says so in a fourth, `mm_inv_projector_objective`; a tower whose layer, filter or crop the published
code would not use, in `vision_feature_layer`, `image_resample` and `image_do_center_crop`; a model that saw
other pixels than the published ones, in `image_conversion`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ross.checkpoint.manifest import Manifest
from megatron_ross.config.json_files import read_json
from megatron_ross.config.model import DenoiserConfig, LanguageModelConfig, RossModelConfig, VisionConfig
from megatron_ross.convert.composite_config import PUBLISHED_SIGLIP_LAYER, has_denoiser
from megatron_ross.convert.preprocessor import preprocessed, stored_preprocessor
from megatron_ross.convert.sources import GENERATION_FILES, SOURCE_CONFIG

ARCHITECTURES = {"qwen2": "RossQwen2ForCausalLM", "llama": "RossLlamaForCausalLM"}
_TOKENIZER_MAX_LENGTH = 2048
_OUR_VISION_FIELDS = ("vision_feature_layer", "image_resample", "image_do_center_crop", "image_conversion")


def published_config(manifest: Manifest, assets: Path, dtype: str) -> dict[str, Any]:
    """Fields of config.json.

    Args:
        manifest: of the checkpoint.
        assets: folder with the config.json that the model was imported from, and its generation config.
        dtype: dtype name of the written language model.
    """
    model = manifest.model
    source = read_json(assets / SOURCE_CONFIG)
    names = {source.part: source.name for source in manifest.sources}
    if str(source.get("model_type", "")).startswith("ross_"):
        config = dict(source)
    else:
        text = source.get("text_config", source)
        names = {"vision": source["mm_vision_tower"]} | names if source.get("mm_vision_tower") else names
        config = text | language_fields(model.language) | _published_fields(manifest, names)
        if config.get("pad_token_id") is None and (assets / GENERATION_FILES[0]).is_file():
            config["pad_token_id"] = read_json(assets / GENERATION_FILES[0]).get("pad_token_id")
    config |= _vision_fields(model.vision, assets)
    if model.denoiser is not None and model.vae is not None:
        if not has_denoiser(config):
            config |= _denoiser_fields(model, names)
        config["mm_inv_hidden_size"] = model.vae.denoiser_channels  # early exports of ours hold another number
        config["vae_config"] = model.vae.hf_config
        config["mm_inv_projector_width"] = model.denoiser.width
        config.pop("mm_inv_projector_objective", None)
        if model.denoiser.objective != DenoiserConfig.objective:
            config["mm_inv_projector_objective"] = model.denoiser.objective
    config["torch_dtype"] = dtype
    config.pop("dtype", None)  # transformers 5's name of torch_dtype, which the published code does not know
    return {name: value for name, value in config.items() if name not in _OUR_VISION_FIELDS or value is not None}


def _vision_fields(vision: VisionConfig, assets: Path) -> dict[str, Any]:
    """What training may have changed, and what the published format has no field for; None where there is no need."""
    fixed = vision.model_type == "siglip_vision_model" and vision.select_layer != PUBLISHED_SIGLIP_LAYER
    said = _usual_processing(vision) and _file_agrees(vision, assets)
    return {
        "vision_config": vision.hf_config,
        "image_aspect_ratio": vision.image_aspect_ratio,
        "vision_feature_layer": vision.select_layer if fixed else None,
        "image_resample": None if said else vision.resample,
        "image_do_center_crop": None if said else vision.crops,
        "image_conversion": None
        if vision.image_conversion == VisionConfig.image_conversion
        else vision.image_conversion,
    }


def _usual_processing(vision: VisionConfig) -> bool:
    return (vision.resample, vision.do_center_crop) == (VisionConfig.resample, VisionConfig.do_center_crop)


def _file_agrees(vision: VisionConfig, assets: Path) -> bool:
    """False where the tower's own file, which earlier versions did not heed, says something else than the manifest."""
    stored = stored_preprocessor(assets)
    try:
        return stored is None or preprocessed(vision, *stored) == vision
    except ValueError:
        return False


def language_fields(language: LanguageModelConfig) -> dict[str, Any]:
    """Inverse of `component_config.language_config`: the language model's fields with their Hugging Face names."""
    fields = {
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_query_groups,
        "vocab_size": language.vocab_size,
        "max_position_embeddings": language.max_position_embeddings,
        "rms_norm_eps": language.layernorm_epsilon,
        "rope_theta": language.rotary_base,
        "hidden_act": "silu",
        "initializer_range": language.init_method_std,
        "tie_word_embeddings": language.share_embeddings_and_output_weights,
    }
    if language.kv_channels * language.num_attention_heads != language.hidden_size:
        fields["head_dim"] = language.kv_channels
    if language.rope_scaling is not None:
        fields["rope_scaling"] = language.rope_scaling
    return fields


def _published_fields(manifest: Manifest, names: dict[str, str]) -> dict[str, Any]:
    """Fields that the published code adds to the language model's config; `names` has those of the parts."""
    model = manifest.model
    reconstructs = model.denoiser is not None
    fields = {
        "_name_or_path": names.get("language", ""),
        "architectures": [ARCHITECTURES[model.language.family]],
        "model_type": f"ross_{model.language.family}",
        "freeze_mm_mlp_adapter": False,
        "image_embed_len": model.vision.num_image_tokens,
        "image_mean": list(model.vision.image_mean),
        "image_std": list(model.vision.image_std),
        "mm_hidden_size": model.vision.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": model.projector.type,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": model.vision.select_layer,
        "mm_vision_tower": names.get("vision", model.vision.model_type),
        "mm_vision_tower_lr": None,
        "ross_enable": reconstructs,
        "tokenizer_model_max_length": _max_length(manifest),
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
    }
    return fields


def _denoiser_fields(model: RossModelConfig, names: dict[str, str]) -> dict[str, Any]:
    return {
        "decode_image_size": model.decode_image_size,
        "mm_inv_projector_lr": None,
        "mm_inv_projector_type": model.denoiser.type if model.denoiser is not None else None,
        "mm_pixel_decoder": names.get("vae", "vae"),
        "ross_enable": True,
        "use_mm_inv_proj": True,
    }


def _max_length(manifest: Manifest) -> int:
    """Sequence length of the training run, if the trainer recorded one."""
    return int(manifest.training.get("settings", {}).get("seq_length", _TOKENIZER_MAX_LENGTH))
