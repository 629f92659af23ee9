"""What a Ross model is made of: one frozen dataclass per part, stored as JSON in every checkpoint's manifest.

Nothing here says how the model is laid out over machines or trained; see `config/schema.py` for that. Only the
standard library is imported, so planners, converters and trainers can all read it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

IMAGE_TOKEN_ID = -200
"""Id of an image token in `input_ids`, as in the published code. Never embedded: image embeddings replace it."""

IGNORE_LABEL = -100
"""Label of a position without supervision."""

MAX_IMAGES_PER_SAMPLE = 256
"""The noise of an image is keyed by its number in the sample; those of more images would repeat another epoch's."""


@dataclass(frozen=True)
class LanguageModelConfig:
    """Decoder-only LLM. Field names are Megatron's `TransformerConfig` names."""

    family: str  # "qwen2" or "llama"
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    layernorm_epsilon: float
    add_qkv_bias: bool
    share_embeddings_and_output_weights: bool
    rope_scaling: dict[str, Any] | None = None
    init_method_std: float = 0.02


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower: `hf_config` is its Hugging Face config, model_type siglip_vision_model or clip_vision_model."""

    hf_config: dict[str, Any]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    select_layer: int = -2
    image_aspect_ratio: str = "pad"  # "pad" or "square"
    resample: str = "bicubic"  # "bilinear", "bicubic" or "lanczos", as Pillow has them
    do_center_crop: bool | None = None  # None: as the family does: CLIP crops the centre, SigLIP stretches
    image_conversion: str = "published"  # or "viewer", see DataConfig.image_conversion; older checkpoints do not say

    @property
    def model_type(self) -> str:
        return self.hf_config["model_type"]

    @property
    def hidden_size(self) -> int:
        return self.hf_config["hidden_size"]

    @property
    def image_size(self) -> int:
        """Side of the tower's square input in pixels."""
        return self.hf_config["image_size"]

    @property
    def patch_size(self) -> int:
        return self.hf_config["patch_size"]

    @property
    def grid_size(self) -> int:
        """Patches per side, n; one image has n*n tokens."""
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        return self.grid_size**2

    @property
    def crops(self) -> bool:
        """True if the shorter side is resized and the centre cut out, False if the image is stretched to a square."""
        return self.model_type == "clip_vision_model" if self.do_center_crop is None else self.do_center_crop

    def shown(self, image_aspect_ratio: str | None, image_conversion: str | None) -> VisionConfig:
        """The tower with images that become square and RGB in another way; None: as they do already."""
        return dataclasses.replace(
            self,
            image_aspect_ratio=image_aspect_ratio or self.image_aspect_ratio,
            image_conversion=image_conversion or self.image_conversion,
        )


@dataclass(frozen=True)
class ProjectorConfig:
    """`identity`, `linear` or `mlpNx_gelu` (N linear layers with exact GELU between)."""

    type: str = "mlp2x_gelu"


@dataclass(frozen=True)
class DenoiserConfig:
    """`denoiser_vit{depth}x`. `width` is not in published configs: take it from the tensors."""

    depth: int = 3
    width: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    frequency_embedding_size: int = 256
    objective: str = "denoise"  # or "regress", see LossConfig.recon_objective: what it has learned to give

    @property
    def type(self) -> str:
        return f"denoiser_vit{self.depth}x"


@dataclass(frozen=True)
class VaeConfig:
    """Frozen image auto-encoder: `hf_config` is the diffusers AutoencoderKL config."""

    hf_config: dict[str, Any]

    @property
    def latent_channels(self) -> int:
        return self.hf_config["latent_channels"]

    @property
    def denoiser_channels(self) -> int:
        """Channels of a denoiser token, a window of 2 x 2 latent cells (published name `mm_inv_hidden_size`)."""
        return 4 * self.latent_channels

    @property
    def scaling_factor(self) -> float:
        return self.hf_config["scaling_factor"]

    @property
    def shift_factor(self) -> float:
        return self.hf_config["shift_factor"] or 0.0


@dataclass(frozen=True)
class RossModelConfig:
    """A whole model. Without `denoiser` and `vae` it is plain LLaVA."""

    language: LanguageModelConfig
    vision: VisionConfig
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    denoiser: DenoiserConfig | None = None
    vae: VaeConfig | None = None

    def __post_init__(self) -> None:
        if (self.denoiser is None) != (self.vae is None):
            raise ValueError("denoiser and vae come together: give both (Ross) or neither (LLaVA)")

    @property
    def same_tensors(self) -> RossModelConfig:
        """The model without what a run may set: equal for checkpoints whose tensors fit each other."""
        vision = self.vision.shown("pad", "published")
        denoiser = dataclasses.replace(self.denoiser, objective="denoise") if self.denoiser else None
        return dataclasses.replace(self, vision=vision, denoiser=denoiser)

    @property
    def decode_image_size(self) -> int:
        """Side of the VAE input in pixels: two latent cells (8 px each) per patch."""
        return 16 * self.vision.grid_size

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> RossModelConfig:
        """Inverse of `to_dict`, also after a trip through JSON.

        Raises:
            TypeError, KeyError: a field is missing or unknown.
        """
        vision = dict(d["vision"])
        for key in ("image_mean", "image_std"):
            vision[key] = tuple(vision[key])
        return cls(
            language=LanguageModelConfig(**d["language"]),
            vision=VisionConfig(**vision),
            projector=ProjectorConfig(**d["projector"]),
            denoiser=DenoiserConfig(**d["denoiser"]) if d.get("denoiser") else None,
            vae=VaeConfig(**d["vae"]) if d.get("vae") else None,
        )
