"""Configs read off stored tensors, for checkpoints that have the weights of a component but not its config.

Names and shapes give every size. What they cannot give (attention heads, activation, scaling of the latents, groups of
the norms) is known for public components, which are recognised by their sizes; for others the caller has to ask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_ross.convert.hf_io import TensorInfo
from megatron_ross.convert.known_components import FLUX_VAE, KNOWN_TOWERS, TOWERS_KNOWN_BY_SHAPE

Shapes = Mapping[str, tuple[int, ...]]


def shapes_below(tensors: Mapping[str, TensorInfo], prefix: str) -> dict[str, tuple[int, ...]]:
    """Name behind `prefix` -> shape."""
    return {name.removeprefix(prefix): info.shape for name, info in tensors.items() if name.startswith(prefix)}


def tower_sizes(shapes: Shapes) -> dict[str, int | str]:
    """Sizes of a SigLIP or CLIP tower, with their names in its config, and `num_patches` in place of `image_size`.

    Args:
        shapes: of the tower's tensors, named as behind `vision_model.`.

    Raises:
        ValueError: there are none, or they are no such tower's.
    """
    try:
        hidden, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        is_clip = "embeddings.class_embedding" in shapes
        return {
            "model_type": "clip_vision_model" if is_clip else "siglip_vision_model",
            "hidden_size": hidden,
            "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\."),
            "patch_size": patch,
            "num_patches": shapes["embeddings.position_embedding.weight"][0] - is_clip,
        }
    except (KeyError, ValueError, IndexError):
        raise ValueError("there are no tensors of a SigLIP or CLIP tower") from None


def known_tower(sizes: dict[str, int | str]) -> dict[str, Any] | None:
    """Config of the public tower with these sizes (see `tower_sizes`); None if none has them."""
    for name in TOWERS_KNOWN_BY_SHAPE:
        tower = KNOWN_TOWERS[name]
        patches = (tower["image_size"] // tower["patch_size"]) ** 2
        if all(value == (tower | {"num_patches": patches})[size] for size, value in sizes.items()):
            return tower
    return None


def vae_sizes(shapes: Shapes) -> dict[str, Any]:
    """Fields of an AutoencoderKL config that its tensors determine.

    Args:
        shapes: of all its tensors, under their diffusers names.

    Raises:
        ValueError: there are none, or they are no such auto-encoder's.
    """
    try:
        blocks = range(_count(shapes, r"encoder\.down_blocks\.(\d+)\."))
        return {
            "block_out_channels": [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in blocks],
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "use_post_quant_conv": "post_quant_conv.weight" in shapes,
            "use_quant_conv": "quant_conv.weight" in shapes,
        }
    except (KeyError, IndexError):
        raise ValueError("there are no tensors of an AutoencoderKL") from None


def known_vae(sizes: dict[str, Any]) -> dict[str, Any] | None:
    """Config of the FLUX.1 auto-encoder if these are its sizes (see `vae_sizes`), else None."""
    return FLUX_VAE if all(FLUX_VAE[name] == value for name, value in sizes.items()) else None


def described(sizes: dict[str, Any]) -> str:
    """The sizes for a message."""
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def _count(names: Iterable[str], pattern: str) -> int:
    """Number of different matches of the pattern's group at the start of a name."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})
