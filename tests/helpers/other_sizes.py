"""Small components whose every size differs from the golden ones and from each other, with what a config can hide.

The golden language models are as wide as the denoiser's tokens have channels (64), so a test with them cannot tell one
number from the other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.helpers.golden import GOLDEN

LATENT_CHANNELS = 6
LLM_WIDTH = 96
TOKENIZERS = {"qwen2": "llm_qwen2", "llama": "llm_vicuna"}


def write_llm(folder: Path, family: str = "qwen2") -> Path:
    """Three layers, width 96, tokenizer of the golden model of that family."""
    golden = GOLDEN / TOKENIZERS[family]
    sizes: dict[str, Any] = {
        "hidden_size": LLM_WIDTH,
        "intermediate_size": 208,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 640,
        "max_position_embeddings": 1024,
        "rope_theta": 5e4,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(1)
    is_qwen = family == "qwen2"
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)) if is_qwen else LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(folder)
    for file in golden.iterdir():
        if file.name not in ("config.json", "model.safetensors", "generation_config.json"):
            shutil.copy(file, folder)
    return folder


def write_tower(folder: Path, kind: str = "siglip", **preprocessor: Any) -> Path:
    """42 pixels in patches of 6, so 49 tokens, width 40, five layers; `preprocessor` changes its processor's file."""
    sizes = {
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "image_size": 42,
        "patch_size": 6,
    }
    torch.manual_seed(2)
    if kind == "siglip":
        SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(folder)
        processor: dict[str, Any] = {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 42, "width": 42},
        }
    else:
        CLIPVisionModel(CLIPVisionConfig(**sizes, projection_dim=24)).save_pretrained(folder)
        processor = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 42},
            "crop_size": {"height": 42, "width": 42},
            "do_center_crop": True,
        }
    processor |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | preprocessor))
    return folder


def vae_config(**changes: Any) -> dict[str, Any]:
    """Config of a small auto-encoder of FLUX's kind with six latent channels."""
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [8, 12, 20, 20],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "layers_per_block": 1,
        "mid_block_add_attention": True,
        "norm_num_groups": 4,
        "out_channels": 3,
        "scaling_factor": 0.7,
        "shift_factor": 0.2,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    } | changes


def build_vae(**changes: Any) -> AutoencoderKL:
    """That auto-encoder with random weights."""
    torch.manual_seed(3)
    return AutoencoderKL.from_config({k: v for k, v in vae_config(**changes).items() if not k.startswith("_")})


def write_vae(folder: Path, **changes: Any) -> Path:
    build_vae(**changes).save_pretrained(folder)
    return folder


def write_sparse_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A file with the header of full-size tensors whose data are a hole: it takes no room on the disk."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + torch.Size(shape).numel() * {"BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
