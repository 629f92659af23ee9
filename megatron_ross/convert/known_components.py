"""Public configs of the components that published checkpoints name but do not contain.

A published composite has the weights of its tower and auto-encoder, but their configs only as a name. These are the
facts for the names in use, so that such a checkpoint can be read without network and without leaving its folder.
"""

from __future__ import annotations

from typing import Any


def _siglip(hidden: int, ffn: int, layers: int, heads: int, patch: int, image: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": hidden,
        "image_size": image,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "patch_size": patch,
    }


def _clip(hidden: int, layers: int, heads: int, patch: int, image: int, projection: int) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": hidden,
        "image_size": image,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "patch_size": patch,
        "projection_dim": projection,
    }


KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "siglip-so400m-patch14-384": _siglip(1152, 4304, 27, 16, patch=14, image=384),
    "siglip-so400m-patch14-224": _siglip(1152, 4304, 27, 16, patch=14, image=224),
    "siglip-large-patch16-256": _siglip(1024, 4096, 24, 16, patch=16, image=256),
    "siglip-large-patch16-384": _siglip(1024, 4096, 24, 16, patch=16, image=384),
    "siglip-base-patch16-224": _siglip(768, 3072, 12, 12, patch=16, image=224),
    "siglip-base-patch16-256": _siglip(768, 3072, 12, 12, patch=16, image=256),
    "siglip-base-patch16-384": _siglip(768, 3072, 12, 12, patch=16, image=384),
    "siglip-base-patch16-512": _siglip(768, 3072, 12, 12, patch=16, image=512),
    "clip-vit-large-patch14-336": _clip(1024, 24, 16, patch=14, image=336, projection=768),
    "clip-vit-large-patch14": _clip(1024, 24, 16, patch=14, image=224, projection=768),
    "clip-vit-base-patch16": _clip(768, 12, 12, patch=16, image=224, projection=512),
    "clip-vit-base-patch32": _clip(768, 12, 12, patch=32, image=224, projection=512),
}
"""Last component of the tower's name -> its vision config."""

TOWERS_KNOWN_BY_SHAPE = (
    *(name for name in KNOWN_TOWERS if name.startswith("siglip")),
    "clip-vit-large-patch14-336",
)
"""Towers that their tensors identify. CLIP towers for 224 pixels exist with two activations and equal shapes."""

IMAGE_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Family -> channel mean and standard deviation of the image processors of all `KNOWN_TOWERS`."""

FLUX_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
"""Config of the FLUX.1 auto-encoder."""
