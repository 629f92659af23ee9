"""Small random models for other programs to answer with: heads of 32 (vLLM's kernels have none smaller), and weights so
wide apart that answers depend on the picture, the question, the template and the tower's layer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
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

from megatron_ross.convert.cli import export_checkpoint, import_checkpoint
from megatron_ross.huggingface.chat_templates import chat_template
from tests.helpers.golden import GOLDEN

MODELS = ("qwen2_siglip", "llama_clip")
WIDTH, TOWER_WIDTH = 96, 64
_TEXT = {
    "vocab_size": 576,
    "hidden_size": WIDTH,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_TOWER = {
    "hidden_size": TOWER_WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 70,
    "patch_size": 14,
}


def make_exports(folder: Path, model: str) -> dict[str, Path]:
    """Both formats of a model, from components that were imported: {"llava": folder, "ross": folder}.

    Args:
        folder: to write in.
        model: one of MODELS.
    """
    torch.manual_seed(MODELS.index(model))
    language, tower = (_qwen2(), _siglip()) if model == "qwen2_siglip" else (_llama(), _clip())
    tokenizer, preprocessor = (
        ("llm_qwen2", "vision_siglip") if model == "qwen2_siglip" else ("llm_vicuna", "vision_clip")
    )
    projector = nn.Sequential(nn.Linear(TOWER_WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    _spread(projector, 0.3)
    _write_language(folder / "llm", language, GOLDEN / tokenizer)
    _write_tower(folder / "tower", tower, GOLDEN / preprocessor)
    weights = {f"model.mm_projector.{name}": value for name, value in projector.state_dict().items()}
    torch.save(weights, folder / "mm_projector.bin")
    import_checkpoint(
        folder / "megatron",
        llm=str(folder / "llm"),
        vision_tower=str(folder / "tower"),
        mm_projector=folder / "mm_projector.bin",
    )
    exports = {name: folder / name for name in ("llava", "ross")}
    for name, output in exports.items():
        export_checkpoint(folder / "megatron", output, name, templates=chat_template)
    return exports


def _qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**_TEXT, num_key_value_heads=1, eos_token_id=575, bos_token_id=573))


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_TEXT, num_key_value_heads=3, rms_norm_eps=1e-5))


def _siglip() -> nn.Module:
    return SiglipVisionModel(SiglipVisionConfig(**_TOWER))


def _clip() -> nn.Module:
    return CLIPVisionModel(CLIPVisionConfig(**_TOWER))


def _spread(module: nn.Module, std: float) -> None:
    """Normal weights and biases; norms stay near one."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, std)


def _write_language(folder: Path, model: nn.Module, source: Path) -> None:
    """Weights and config, with the tokenizer and generation config of a golden model."""
    _spread(model, 0.15)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    _write_config(folder / "config.json", model.config.to_dict())


def _write_tower(folder: Path, model: nn.Module, source: Path) -> None:
    _spread(model, 0.15)
    folder.mkdir()
    tensors = {
        f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _write_config(folder / "config.json", model.config.to_dict())
    preprocessor = json.loads((source / "preprocessor_config.json").read_text())
    side = _TOWER["image_size"]
    size = {"height": side, "width": side} if isinstance(preprocessor["size"], dict) else side
    crop = {"crop_size": side} if "crop_size" in preprocessor else {}
    _write_config(folder / "preprocessor_config.json", preprocessor | {"size": size} | crop)


def _write_config(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2))
