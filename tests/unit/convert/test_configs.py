"""Configs of real checkpoints, and the inverse direction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.config.model import RossModelConfig
from megatron_ross.convert.component_config import language_config, tower_config, vision_config
from megatron_ross.convert.composite_config import denoiser_config, ross_model_config
from megatron_ross.convert.known_components import FLUX_VAE, KNOWN_TOWERS
from megatron_ross.convert.published_config import language_fields

LLAMA_3_1 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def _golden_config(golden_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((golden_dir / name / "config.json").read_text())


@pytest.mark.parametrize("name", ["llm_qwen2", "llm_vicuna"])
def test_golden_language_models(golden_dir: Path, name: str) -> None:
    model = language_config(_golden_config(golden_dir, name), name)
    assert (model.hidden_size, model.num_layers, model.vocab_size, model.kv_channels) == (64, 4, 576, 16)
    assert model.num_query_groups == {"llm_qwen2": 2, "llm_vicuna": 4}[name]
    assert model.add_qkv_bias == (name == "llm_qwen2")
    assert model.rotary_base == {"llm_qwen2": 1e6, "llm_vicuna": 1e4}[name]


def test_llama_3_rope_scaling_in_both_spellings() -> None:
    """transformers 5 writes `rope_parameters` with the base inside."""
    old = language_config(LLAMA_3_1, "old")
    assert old.rope_scaling == LLAMA_3_1["rope_scaling"]
    assert old.rotary_base == 500000.0
    fields = {k: v for k, v in LLAMA_3_1.items() if k not in ("rope_theta", "rope_scaling")}
    new = language_config(fields | {"rope_parameters": {"rope_theta": 500000.0, **LLAMA_3_1["rope_scaling"]}}, "new")
    assert new == old


@pytest.mark.parametrize("config", [LLAMA_3_1, LLAMA_3_1 | {"head_dim": 64, "tie_word_embeddings": True}])
def test_language_fields_invert_language_config(config: dict[str, Any]) -> None:
    model = language_config(config, "first")
    assert language_config({"model_type": "llama", **language_fields(model)}, "again") == model


def test_towers_alone_and_inside_the_full_model(golden_dir: Path) -> None:
    """Hub checkpoints of CLIP and SigLIP are whole models, whose vision_config leaves out default values."""
    alone = tower_config(golden_dir / "vision_siglip")
    values = {k: v for k, v in alone.hf_config.items() if k not in ("num_channels", "layer_norm_eps", "model_type")}
    nested = vision_config(
        {"model_type": "siglip", "text_config": {}, "vision_config": values},
        "nested",
        alone.image_mean,
        alone.image_std,
    )
    assert nested == alone


def test_published_7b_config_needs_nothing_but_its_names(tmp_path: Path) -> None:
    """The released composite names SigLIP and FLUX: their configs are built in, and nothing is looked up."""
    config = {
        "model_type": "ross_qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_pixel_decoder": "black-forest-labs/FLUX.1-dev",
        "mm_inv_projector_type": "denoiser_vit3x",
        "mm_inv_projector_width": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 1152,
        "image_embed_len": 729,
        "decode_image_size": 432,
        "image_aspect_ratio": "pad",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    model = ross_model_config(config, tmp_path)
    assert model.vision.num_image_tokens == 729
    assert model.decode_image_size == 432
    assert model.vae is not None
    assert model.vae.hf_config == FLUX_VAE
    assert model.denoiser == denoiser_config("denoiser_vit3x")
    with pytest.raises(ValueError, match="tower 'someone/else' is unknown"):
        ross_model_config(config | {"mm_vision_tower": "someone/else"}, tmp_path)
    with pytest.raises(ValueError, match="auto-encoder 'someone/vae' is unknown"):
        ross_model_config(config | {"mm_pixel_decoder": "someone/vae"}, tmp_path)


def test_a_component_folder_inside_the_checkpoint_is_found(golden_dir: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(golden_dir / "ross_qwen2_siglip", tmp_path / "composite")
    for component in ("vision_siglip", "vae"):
        shutil.copytree(golden_dir / component, folder / component)
    config = _golden_config(golden_dir, "ross_qwen2_siglip")
    inside = ross_model_config(config, folder)
    given = ross_model_config(
        config,
        golden_dir / "ross_qwen2_siglip",
        vision_dir=golden_dir / "vision_siglip",
        vae_dir=golden_dir / "vae",
    )
    assert inside == given
    assert inside.denoiser is not None
    assert inside.denoiser.width == 64  # from the tensors


def test_siglip_layer_is_fixed_whatever_the_config_says(golden_dir: Path) -> None:
    for name, tower, layer in (("ross_qwen2_siglip", "vision_siglip", -2), ("ross_llama_clip", "vision_clip", -3)):
        config = _golden_config(golden_dir, name) | {"mm_vision_select_layer": -3}
        model = ross_model_config(config, golden_dir / name, vision_dir=golden_dir / tower, vae_dir=golden_dir / "vae")
        assert model.vision.select_layer == layer


def test_manifest_model_survives_json(golden_dir: Path) -> None:
    model = ross_model_config(
        _golden_config(golden_dir, "ross_llama_clip"),
        golden_dir / "ross_llama_clip",
        vision_dir=golden_dir / "vision_clip",
        vae_dir=golden_dir / "vae",
    )
    assert RossModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model


@pytest.mark.parametrize("name", KNOWN_TOWERS)
def test_known_towers_have_the_published_token_counts(name: str) -> None:
    vision = vision_config(KNOWN_TOWERS[name], name, (0.5,) * 3, (0.5,) * 3)
    tokens = {"siglip-so400m-patch14-384": 729, "clip-vit-large-patch14-336": 576, "clip-vit-base-patch32": 49}
    assert vision.num_image_tokens == tokens.get(name, vision.num_image_tokens)
    assert str(vision.image_size) in name or vision.image_size == 224
