"""Composite checkpoints in the published format, made from the golden ones by changing parts, and their import."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.config.model import DenoiserConfig, RossModelConfig
from megatron_ross.convert.importer import plan_checkpoint, write_checkpoint
from megatron_ross.models.denoiser import RossDenoiser
from tests.helpers import golden
from tests.helpers.oracle import DENOISER, PROJECTOR, TOWER, VAE

Edit = Callable[[dict[str, Tensor], dict[str, Any]], None]
"""Changes tensors and config.json in place."""


@dataclass(frozen=True)
class Stored:
    """A model on disk: the composite folder, and the Megatron checkpoint imported from it."""

    composite: Path
    path: Path
    model: RossModelConfig


def make_variant(folder: Path, base: str, *edits: Edit) -> Stored:
    """Copy golden model `base` to `folder`, change it, and import it with the project's converter."""
    composite = folder / "composite"
    shutil.copytree(golden.checkpoint_dir(base), composite)
    info = golden.metadata()["models"][base]
    config = json.loads((composite / "config.json").read_text())
    for field, part in (("vision_config", "vision_tower"), ("vae_config", "auto_encoder")):
        config[field] = json.loads((golden.GOLDEN / info[part] / "config.json").read_text())
    tensors = load_file(composite / "model.safetensors")
    for edit in edits:
        edit(tensors, config)
    (composite / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, composite / "model.safetensors", {"format": "pt"})
    root = write_checkpoint(plan_checkpoint(str(composite), None, None), folder / "imported")
    path = resolve_checkpoint(root)
    return Stored(composite, path, Manifest.read(path).model)


def tied(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Qwen2-0.5B style: the LM head is the embedding."""
    del tensors["lm_head.weight"]
    config["tie_word_embeddings"] = True


def odd_vocabulary(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """One more token, so that no even number of ranks divides the vocabulary."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], tensors[name][7:8] * 0.5])
    config["vocab_size"] += 1


def without_denoiser(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Plain LLaVA."""
    for name in [n for n in tensors if n.startswith((DENOISER, VAE))]:
        del tensors[name]
    for field in ("mm_inv_projector_type", "mm_pixel_decoder", "mm_inv_hidden_size", "decode_image_size", "vae_config"):
        config.pop(field)
    config["ross_enable"] = False


def selecting(layer: int) -> Edit:
    def edit(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["mm_vision_select_layer"] = layer

    return edit


def with_projector(kind: str) -> Edit:
    """`linear` or `mlpNx_gelu`."""

    def edit(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.startswith(PROJECTOR)]:
            del tensors[name]
        config["mm_projector_type"] = kind
        width, hidden = config["mm_hidden_size"], config["hidden_size"]
        if kind == "linear":
            module: nn.Module = nn.Linear(width, hidden)
        else:
            layers: list[nn.Module] = [nn.Linear(width, hidden)]
            for _ in range(int(kind[3]) - 1):
                layers += [nn.GELU(), nn.Linear(hidden, hidden)]
            module = nn.Sequential(*layers)
        _randomise(module)
        tensors.update({PROJECTOR + name: t for name, t in module.state_dict().items()})

    return edit


def identity_projector(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """No projector; it needs a tower as wide as the LLM, which is a random SigLIP here."""
    for name in [n for n in tensors if n.startswith((PROJECTOR, TOWER))]:
        del tensors[name]
    config["mm_projector_type"] = "identity"
    config["mm_hidden_size"] = config["vision_config"]["hidden_size"] = config["hidden_size"]
    tower = SiglipVisionModel(SiglipVisionConfig.from_dict(config["vision_config"]))
    _randomise(tower)
    tensors.update({TOWER + n.removeprefix("vision_model."): t for n, t in tower.state_dict().items()})


def with_denoiser(depth: int, width: int) -> Edit:
    """A denoiser of other size with random weights everywhere."""

    def edit(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        table = tensors[DENOISER + "pos_embed"]
        channels, grid = tensors[DENOISER + "x_embedder.proj.weight"].shape[1], round(table.shape[1] ** 0.5)
        for name in [n for n in tensors if n.startswith(DENOISER)]:
            del tensors[name]
        module = RossDenoiser(DenoiserConfig(depth, width), channels, config["hidden_size"], grid)
        _randomise(module)
        tensors.update({DENOISER + name: t for name, t in module.state_dict().items()})
        config["mm_inv_projector_type"] = f"denoiser_vit{depth}x"

    return edit


def _randomise(module: nn.Module) -> None:
    """Weights that keep the signal's size, biases that matter; fixed seed."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        if name == "pos_embed":
            continue
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.05
        parameter.data.normal_(0, scale, generator=generator)
