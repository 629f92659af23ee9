"""Configuration of whole Ross models, in the published format: the LLM's fields, flat, and `mm_*` fields beside them.

Published files name tower and auto-encoder but do not describe them. `vision_config`, `vae_config` and
`mm_inv_projector_width` are additions of ours that make a checkpoint self-contained; `resolve` fills them in, and the
tower's layer, filter and crop with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, Qwen2Config

from megatron_ross.config.json_files import read_json
from megatron_ross.config.model import DenoiserConfig, ProjectorConfig, RossModelConfig, VaeConfig, VisionConfig
from megatron_ross.convert.composite_config import denoiser_config, ross_model_config


@dataclass(kw_only=True)
class RossFields:
    """Fields of a composite config that the LLM's config does not have. Names are the published ones."""

    mm_vision_tower: str | None = None
    mm_vision_select_layer: int = -2
    mm_projector_type: str = "linear"
    mm_pixel_decoder: str | None = None
    mm_inv_projector_type: str | None = None
    mm_inv_projector_width: int | None = None
    mm_inv_projector_objective: str = "denoise"
    image_mean: list | tuple | None = None
    image_std: list | tuple | None = None
    image_aspect_ratio: str = "square"
    vision_feature_layer: int | None = None
    image_resample: str | None = None
    image_do_center_crop: bool | None = None
    image_conversion: str = "published"
    vision_config: dict | None = None
    vae_config: dict | None = None

    @property
    def vision(self) -> VisionConfig:
        """The vision tower.

        Raises:
            ValueError: the config does not describe it.
        """
        if self.vision_config is None or self.image_mean is None or self.image_std is None:
            raise ValueError(
                "the config names its vision tower but does not describe it; load the model with from_pretrained, or "
                "fill the config with `resolve`"
            )
        return VisionConfig(
            hf_config=dict(self.vision_config),
            image_mean=tuple(self.image_mean),
            image_std=tuple(self.image_std),
            select_layer=self.mm_vision_select_layer,
            image_aspect_ratio=self.image_aspect_ratio,
            resample=self.image_resample or VisionConfig.resample,
            do_center_crop=self.image_do_center_crop,
            image_conversion=self.image_conversion,
        )

    @property
    def projector(self) -> ProjectorConfig:
        """The projector."""
        return ProjectorConfig(self.mm_projector_type)

    @property
    def denoiser(self) -> DenoiserConfig | None:
        """The denoiser; None in a plain LLaVA."""
        if self.mm_inv_projector_type is None or self.vae_config is None:
            return None
        return denoiser_config(self.mm_inv_projector_type, self.mm_inv_projector_width, self.mm_inv_projector_objective)

    @property
    def vae(self) -> VaeConfig | None:
        """The auto-encoder; None in a plain LLaVA."""
        return VaeConfig(dict(self.vae_config)) if self.denoiser is not None and self.vae_config else None

    def resolve(self, model: RossModelConfig) -> None:
        """Fill in what `model` knows about tower, denoiser and auto-encoder, so that the config describes itself."""
        self.vision_config = dict(model.vision.hf_config)
        self.image_mean = list(model.vision.image_mean)
        self.image_std = list(model.vision.image_std)
        self.mm_vision_select_layer = self.vision_feature_layer = model.vision.select_layer
        self.image_resample, self.image_do_center_crop = model.vision.resample, model.vision.crops
        self.image_aspect_ratio = model.vision.image_aspect_ratio
        self.image_conversion = model.vision.image_conversion
        self.mm_projector_type = model.projector.type
        if model.denoiser is not None and model.vae is not None:
            self.mm_inv_projector_type = model.denoiser.type
            self.mm_inv_projector_width = model.denoiser.width
            self.mm_inv_projector_objective = model.denoiser.objective
            self.vae_config = dict(model.vae.hf_config)


class RossQwen2Config(RossFields, Qwen2Config):
    """Ross on Qwen2 or Qwen2.5."""

    model_type = "ross_qwen2"


class RossLlamaConfig(RossFields, LlamaConfig):
    """Ross on Vicuna, Llama-2 or Llama-3."""

    model_type = "ross_llama"


def read_model_config(
    folder: Path, vision_tower: str | Path | None = None, vae: str | Path | None = None
) -> RossModelConfig:
    """Model config of the checkpoint in `folder`.

    Args:
        folder: the checkpoint.
        vision_tower, vae: folders with the configs of tower and auto-encoder. Without them a config that does not
            describe them is completed from a folder of the name it gives beside the checkpoint (a plain name only: no
            path is followed), or from the built-in descriptions of known components.

    Raises:
        ValueError: config.json is missing or wrong, or names components that nothing describes.
    """
    config = read_json(folder / "config.json")
    return ross_model_config(
        config,
        folder,
        vision_dir=Path(vision_tower) if vision_tower else _beside(folder, config, "mm_vision_tower", "vision_config"),
        vae_dir=Path(vae) if vae else _beside(folder, config, "mm_pixel_decoder", "vae_config"),
    )


def _beside(folder: Path, config: dict[str, Any], name_field: str, described_by: str) -> Path | None:
    """Folder named by `name_field` next to the checkpoint, if the config needs it and the name is a plain one."""
    name = config.get(name_field)
    if config.get(described_by) or not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        return None
    candidate = folder.resolve().parent / name
    return candidate if (candidate / "config.json").is_file() else None
