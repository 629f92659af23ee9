"""Vision tower: a complete Hugging Face SigLIP or CLIP module of which only the blocks that matter are run.

All of its tensors are kept, so that checkpoints lose nothing, but the forward pass stops at the selected hidden state:
the last block (with the published `select_layer=-2`), the post norm and SigLIP's pooling head never run.

Shape legend: n images, P pixels per side, N patches per image, d tower width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.initialization import no_init_weights

from megatron_ross.config.model import VisionConfig

_FAMILIES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
}


class VisionTower(nn.Module):
    """Patch features from the selected hidden state, without class token.

    `tower` is the Hugging Face module. Some versions of transformers wrap its parts in a `vision_model` level, others
    do not; here the level is always taken off, so names are `tower.embeddings.*`, `tower.encoder.layers.{i}.*`, ...

    Raises:
        ValueError: unknown tower family, or `select_layer` names a hidden state the tower does not have.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.model_type not in _FAMILIES:
            raise ValueError(
                f"vision tower type {config.model_type!r} is not supported; use one of {', '.join(_FAMILIES)}"
            )
        config_class, model_class = _FAMILIES[config.model_type]
        model = model_class(config_class.from_dict(dict(config.hf_config)))
        self.config = config
        self.tower: Any = getattr(model, "vision_model", model)
        self.num_blocks_run = _num_blocks(config.select_layer, config.hf_config["num_hidden_layers"])
        self.has_class_token = config.model_type == "clip_vision_model"
        self.set_trainable(False)

    def set_trainable(self, trainable: bool) -> None:
        """Freeze the tower, or unfreeze the parameters that take part in the forward pass (others get no gradient)."""
        self.requires_grad_(False)
        for module in self._modules_run():
            module.requires_grad_(trainable)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixels: normalised pixels, float [n, 3, P, P]; n may be 0.

        Returns:
            Features in the tower's dtype, [n, N, d]. No graph is recorded unless the tower is trainable.
        """
        trainable = any(p.requires_grad for module in self._modules_run() for p in module.parameters())
        if pixels.shape[0] == 0:
            return self._no_features(pixels, trainable)
        with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
            hidden_states = self.tower.embeddings(pixels)
            if self.has_class_token:
                hidden_states = self.tower.pre_layrnorm(hidden_states)
            for block in self.tower.encoder.layers[: self.num_blocks_run]:
                hidden_states = block(hidden_states, None)
            return hidden_states[:, 1:] if self.has_class_token else hidden_states

    def _no_features(self, pixels: Tensor, trainable: bool) -> Tensor:
        """Features of zero images, [0, N, d]. If trainable, every parameter that would run gets a zero gradient."""
        if trainable:  # transformers' attention cannot take an empty batch
            return self(pixels.new_zeros(1, *pixels.shape[1:]))[:0]
        dtype = self.tower.embeddings.patch_embedding.weight.dtype
        return pixels.new_zeros(0, self.config.num_image_tokens, self.config.hidden_size, dtype=dtype)

    def _modules_run(self) -> list[nn.Module]:
        pre_norm = [self.tower.pre_layrnorm] if self.has_class_token else []
        return [self.tower.embeddings, *pre_norm, *self.tower.encoder.layers[: self.num_blocks_run]]


def empty_tower(config: VisionConfig) -> VisionTower:
    """A tower whose weights are still to be loaded: random ones would take ten seconds and more."""
    with no_init_weights():
        return VisionTower(config)


def _num_blocks(select_layer: int, num_layers: int) -> int:
    """Blocks to run for Hugging Face's `hidden_states[select_layer]`; index 0 is the input of the first block."""
    num_states = num_layers + 1
    if not -num_states <= select_layer < num_states:
        raise ValueError(
            f"vision select_layer {select_layer} is out of range: the tower has {num_layers} blocks, so it must be "
            f"between {-num_states} and {num_layers}"
        )
    return select_layer % num_states
