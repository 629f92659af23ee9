"""The name tables against the real classes at full size, built on the meta device: every tensor exactly once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_ross.config.model import ProjectorConfig, RossModelConfig
from megatron_ross.convert.component_config import language_config, vae_config, vision_config
from megatron_ross.convert.composite_config import denoiser_config
from megatron_ross.convert.known_components import FLUX_VAE, KNOWN_TOWERS
from megatron_ross.convert.layouts import canonical_llava_name, llava_mappings, part_of, ross_mappings
from megatron_ross.convert.mapping import TensorMapping
from megatron_ross.models.denoiser import RossDenoiser
from megatron_ross.models.projector import build_projector

SIGLIP, CLIP = KNOWN_TOWERS["siglip-so400m-patch14-384"], KNOWN_TOWERS["clip-vit-large-patch14-336"]
LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _llm(kind: str, hidden: int, ffn: int, layers: int, heads: int, groups: int, vocab: int, **more: Any) -> dict:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        **more,
    }


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2-7b + siglip-so400m": (_llm("qwen2", 3584, 18944, 28, 28, 4, 152064), SIGLIP),
    "vicuna-13b + clip-l-336": (_llm("llama", 5120, 13824, 40, 40, 40, 32000), CLIP),
    "qwen2-0.5b (tied) + siglip-so400m": (
        _llm("qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
        SIGLIP,
    ),
    "llama-3-8b + clip-l-336": (
        _llm("llama", 4096, 14336, 32, 32, 8, 128256, rope_theta=5e5, rope_scaling=LLAMA3_ROPE),
        CLIP,
    ),
}


def _model(family: str) -> RossModelConfig:
    llm, tower = FAMILIES[family]
    return RossModelConfig(
        language_config(llm, family),
        vision_config(tower, family, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ProjectorConfig("mlp2x_gelu"),
        denoiser_config("denoiser_vit3x"),
        vae_config(FLUX_VAE, family),
    )


def _shapes(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _published_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole model, from the classes that own the parts."""
    (llm, tower), model = FAMILIES[family], _model(family)
    with torch.device("meta"):
        is_qwen = llm["model_type"] == "qwen2"
        language = Qwen2ForCausalLM(Qwen2Config(**llm)) if is_qwen else LlamaForCausalLM(LlamaConfig(**llm))
        vision = _tower(tower)
        vae = AutoencoderKL.from_config({k: v for k, v in FLUX_VAE.items() if not k.startswith("_")})
        projector = build_projector(model.projector, model.vision.hidden_size, model.language.hidden_size)
        assert model.denoiser is not None
        denoiser = RossDenoiser(model.denoiser, 64, model.language.hidden_size, model.vision.grid_size)
    shapes = _shapes(language)
    if model.language.share_embeddings_and_output_weights:
        del shapes["lm_head.weight"]
    tower_shapes = {name.removeprefix("vision_model."): shape for name, shape in _shapes(vision).items()}
    shapes |= {f"model.vision_tower.vision_tower.vision_model.{n}": s for n, s in tower_shapes.items()}
    shapes |= _shapes(projector, "model.mm_projector.")
    shapes |= _shapes(vae, "model.pixel_decoder.pixel_decoder.")
    return shapes | _shapes(denoiser, "model.mm_inv_projector.net.")


def _tower(config: dict[str, Any]) -> nn.Module:
    if config["model_type"] == "siglip_vision_model":
        return SiglipVisionModel(SiglipVisionConfig(**config))
    return CLIPVisionModel(CLIPVisionConfig(**config))


def _table(mappings: list[TensorMapping]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a table, after checking that no name and no key comes twice."""
    assert Counter(mapping.key for mapping in mappings).most_common(1)[0][1] == 1
    assert Counter(part.name for mapping in mappings for part in mapping.parts).most_common(1)[0][1] == 1
    return {part.name: part.shape for mapping in mappings for part in mapping.parts}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_published_tensor_is_mapped_exactly_once(family: str) -> None:
    assert _table(ross_mappings(_model(family))) == _published_shapes(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_checkpoint_tensor_has_the_size_of_its_parts(family: str) -> None:
    for mapping in ross_mappings(_model(family)):
        assert torch.Size(mapping.shape).numel() == sum(torch.Size(part.shape).numel() for part in mapping.parts)
        assert part_of(mapping.key) in ("language", "vision", "projector", "denoiser", "vae")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stock_llava_tensor_is_mapped_exactly_once(family: str) -> None:
    llm, tower = FAMILIES[family]
    config = LlavaConfig(
        text_config=llm, vision_config=tower, tie_word_embeddings=llm.get("tie_word_embeddings", False)
    )
    with torch.device("meta"):
        shapes = _shapes(LlavaForConditionalGeneration(config))
    if llm.get("tie_word_embeddings"):
        del shapes["lm_head.weight"]
    assert _table(llava_mappings(_model(family))) == {canonical_llava_name(n): s for n, s in shapes.items()}


@pytest.mark.parametrize("depth", [3, 8, 12])
def test_denoisers_of_every_published_depth(depth: int) -> None:
    family = next(iter(FAMILIES))
    model = replace(_model(family), denoiser=denoiser_config(f"denoiser_vit{depth}x"))
    assert model.denoiser is not None
    assert model.denoiser.width == {3: 1024, 8: 1280, 12: 1536}[depth]
    with torch.device("meta"):
        module = RossDenoiser(model.denoiser, 64, model.language.hidden_size, model.vision.grid_size)
    prefix = "model.mm_inv_projector.net."
    table = {n: s for n, s in _table(ross_mappings(model)).items() if n.startswith(prefix)}
    assert table == _shapes(module, prefix)
