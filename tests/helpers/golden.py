"""Golden data: recorded inputs, draws and outputs of the published computation, and composite checkpoints by part.

Model names are "qwen2_siglip" and "llama_clip". See tests/golden/README.md.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ross.config.model import DenoiserConfig, LanguageModelConfig, RossModelConfig, VaeConfig, VisionConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MODELS = ("qwen2_siglip", "llama_clip")

PARTS = {
    "vision": "model.vision_tower.vision_tower.vision_model.",
    "projector": "model.mm_projector.",
    "denoiser": "model.mm_inv_projector.net.",
    "vae": "model.pixel_decoder.pixel_decoder.",
}
"""Key prefix of every part but the language model in a composite checkpoint."""


@functools.cache
def metadata() -> dict[str, Any]:
    """Contents of metadata.json."""
    return json.loads((GOLDEN / "metadata.json").read_text())


def tolerance(name: str) -> float:
    """A recorded tolerance, e.g. "logits_max_over_maxabs"."""
    return metadata()["tolerances"][name]


def checkpoint_dir(model: str) -> Path:
    """Folder of the composite checkpoint."""
    return GOLDEN / metadata()["models"][model]["composite"]


@functools.cache
def composite(model: str) -> dict[str, Tensor]:
    """All tensors of a composite checkpoint; do not write to them."""
    return load_file(checkpoint_dir(model) / "model.safetensors")


def part(model: str, name: str) -> dict[str, Tensor]:
    """Tensors of one of PARTS with its prefix taken off, or of "language" (names as in Hugging Face)."""
    tensors = composite(model)
    if name == "language":
        return {k: v for k, v in tensors.items() if not k.startswith(tuple(PARTS.values()))}
    prefix = PARTS[name]
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@functools.cache
def case(model: str, letter: str) -> dict[str, Tensor]:
    """Tensors of case `a`, `b`, `c`, `e` or `f`; do not write to them."""
    (path,) = (GOLDEN / "goldens" / model).glob(f"case_{letter}_*[!s][!1-2].safetensors")
    return load_file(path)


@functools.cache
def tensors(relative_path: str) -> dict[str, Tensor]:
    """Tensors of any file under goldens/; do not write to them."""
    return load_file(GOLDEN / "goldens" / relative_path)


def model_config(model: str) -> RossModelConfig:
    """Configuration of a golden model, put together from its folders."""
    info = metadata()["models"][model]
    llm = _json(info["composite"], "config.json")
    preprocessor = _json(info["vision_tower"], "preprocessor_config.json")
    denoiser = info["denoiser"]
    heads = llm["num_attention_heads"]
    return RossModelConfig(
        language=LanguageModelConfig(
            family=llm["model_type"].removeprefix("ross_"),
            num_layers=llm["num_hidden_layers"],
            hidden_size=llm["hidden_size"],
            ffn_hidden_size=llm["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=llm["num_key_value_heads"],
            kv_channels=llm["hidden_size"] // heads,
            vocab_size=llm["vocab_size"],
            max_position_embeddings=llm["max_position_embeddings"],
            rotary_base=llm["rope_theta"],
            layernorm_epsilon=llm["rms_norm_eps"],
            add_qkv_bias=llm["model_type"] == "ross_qwen2",
            share_embeddings_and_output_weights=llm["tie_word_embeddings"],
        ),
        vision=VisionConfig(
            hf_config=_json(info["vision_tower"], "config.json"),
            image_mean=tuple(preprocessor["image_mean"]),
            image_std=tuple(preprocessor["image_std"]),
        ),
        denoiser=DenoiserConfig(depth=denoiser["depth"], width=denoiser["embed_dim"], num_heads=denoiser["num_heads"]),
        vae=VaeConfig(hf_config=_json(info["auto_encoder"], "config.json")),
    )


def assert_close(actual: Tensor, expected: Tensor, relative_to_max: float) -> None:
    """Same shape, and the largest difference is at most `relative_to_max` times the largest expected magnitude."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    assert error <= relative_to_max * scale, f"error {error:.3e} = {error / scale:.2e} of the largest entry {scale:.3e}"


def image_token_states(model: str, letter: str) -> Tensor:
    """Hidden states after the final norm at the first image of every sample, [B, N, h]; zeros without an image."""
    data = case(model, letter)
    hidden = data["out.hidden_states"][-1] if "out.hidden_states" in data else data["out.hidden_final"]
    rows = []
    for sample, first, last in zip(hidden, data["out.boi"].tolist(), data["out.eoi"].tolist(), strict=True):
        n_tokens = metadata()["models"][model]["image_tokens"]
        rows.append(sample[first : last + 1] if first >= 0 else torch.zeros(n_tokens, sample.shape[-1]))
    return torch.stack(rows)


def _json(folder: str, name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / folder / name).read_text())
