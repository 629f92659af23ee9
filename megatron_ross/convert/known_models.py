"""Full-size models by name, `LLM+TOWER`, for planning and for tests that need no weights. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

from megatron_ross.config.model import DenoiserConfig, LanguageModelConfig, RossModelConfig
from megatron_ross.convert.component_config import vae_config, vision_config
from megatron_ross.convert.known_components import FLUX_VAE, IMAGE_STATISTICS, KNOWN_TOWERS

_QWEN2: dict[str, Any] = {
    "family": "qwen2",
    "max_position_embeddings": 32768,
    "rotary_base": 1e6,
    "layernorm_epsilon": 1e-6,
    "add_qkv_bias": True,
}
_VICUNA: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rotary_base": 1e4,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": False,
    "share_embeddings_and_output_weights": False,
    "kv_channels": 128,
}

KNOWN_LANGUAGE_MODELS = {
    "qwen2-0.5b": LanguageModelConfig(
        **_QWEN2,
        num_layers=24,
        hidden_size=896,
        ffn_hidden_size=4864,
        num_attention_heads=14,
        num_query_groups=2,
        kv_channels=64,
        vocab_size=151936,
        share_embeddings_and_output_weights=True,
    ),
    "qwen2-7b": LanguageModelConfig(
        **_QWEN2,
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        kv_channels=128,
        vocab_size=152064,
        share_embeddings_and_output_weights=False,
    ),
    "vicuna-7b": LanguageModelConfig(
        **_VICUNA, num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, num_query_groups=32
    ),
    "vicuna-13b": LanguageModelConfig(
        **_VICUNA, num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40, num_query_groups=40
    ),
}

_TOWERS = {"siglip-so400m": "siglip-so400m-patch14-384", "clip-l-336": "clip-vit-large-patch14-336"}


def known_model(name: str, *, reconstructs: bool = True) -> RossModelConfig:
    """Ross with the published denoiser and auto-encoder, or with `reconstructs=False` the LLaVA baseline.

    Raises:
        ValueError: a name that is not `LLM+TOWER` with both known.
    """
    language, _, tower = name.partition("+")
    if language not in KNOWN_LANGUAGE_MODELS or tower not in _TOWERS:
        raise ValueError(
            f"model={name!r}: not known; write one of {', '.join(KNOWN_LANGUAGE_MODELS)}, then +, then one of "
            f"{', '.join(_TOWERS)}, or give a checkpoint"
        )
    component = _TOWERS[tower]
    values = KNOWN_TOWERS[component]
    return RossModelConfig(
        language=KNOWN_LANGUAGE_MODELS[language],
        vision=vision_config(values, component, *IMAGE_STATISTICS[values["model_type"]]),
        denoiser=DenoiserConfig() if reconstructs else None,
        vae=vae_config(FLUX_VAE, "FLUX.1") if reconstructs else None,
    )
