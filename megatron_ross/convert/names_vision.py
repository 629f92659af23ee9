"""Name table of the vision towers: SigLIP, SigLIP2 with fixed resolution, and CLIP.

Names are those of `SiglipVisionModel` and `CLIPVisionModel` without the `vision_model.` level; the whole tower is kept,
with the layers above the selected one, the post norm and SigLIP's pooling head.
"""

from __future__ import annotations

from megatron_ross.config.model import VisionConfig
from megatron_ross.convert.mapping import TensorMapping, direct

HF_PREFIX = "vision_model."
"""Level that published checkpoints have in front of every tower name."""

IGNORED_TENSORS = (
    r"vision_model\.embeddings\.position_ids",
    r"text_model\..*",
    r"text_projection\.weight",
    r"visual_projection\.weight",
    r"logit_scale",
    r"logit_bias",
)
"""Of a full CLIP or SigLIP model: the text tower and the contrastive head, which are not part of the vision tower."""


def tower_mappings(config: VisionConfig) -> list[TensorMapping]:
    """Every tensor of the tower, in the order of the published state dict."""
    hf = config.hf_config
    rows = _Rows()
    rows.embeddings(config)
    for index in range(hf["num_hidden_layers"]):
        rows.encoder_layer(f"encoder.layers.{index}.", hf["hidden_size"], hf["intermediate_size"])
    rows.norm("post_layernorm", hf["hidden_size"])
    if config.model_type == "siglip_vision_model" and hf.get("vision_use_head", True):
        rows.pooling_head(hf["hidden_size"], hf["intermediate_size"])
    return rows.mappings


class _Rows:
    """Collects table rows; a tower tensor has the same name on both sides."""

    def __init__(self) -> None:
        self.mappings: list[TensorMapping] = []

    def tensor(self, name: str, *shape: int) -> None:
        self.mappings.append(direct(f"vision.tower.{name}", name, *shape))

    def linear(self, name: str, outputs: int, inputs: int) -> None:
        self.tensor(f"{name}.weight", outputs, inputs)
        self.tensor(f"{name}.bias", outputs)

    def norm(self, name: str, width: int) -> None:
        self.tensor(f"{name}.weight", width)
        self.tensor(f"{name}.bias", width)

    def embeddings(self, config: VisionConfig) -> None:
        width, patch = config.hidden_size, config.patch_size
        pixels = (config.hf_config["num_channels"], patch, patch)
        if config.model_type == "clip_vision_model":
            self.tensor("embeddings.class_embedding", width)
            self.tensor("embeddings.patch_embedding.weight", width, *pixels)
            self.tensor("embeddings.position_embedding.weight", config.num_image_tokens + 1, width)
            self.norm("pre_layrnorm", width)
        else:
            self.tensor("embeddings.patch_embedding.weight", width, *pixels)
            self.tensor("embeddings.patch_embedding.bias", width)
            self.tensor("embeddings.position_embedding.weight", config.num_image_tokens, width)

    def encoder_layer(self, prefix: str, width: int, intermediate: int) -> None:
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            self.linear(f"{prefix}self_attn.{projection}", width, width)
        self.norm(f"{prefix}layer_norm1", width)
        self.linear(f"{prefix}mlp.fc1", intermediate, width)
        self.linear(f"{prefix}mlp.fc2", width, intermediate)
        self.norm(f"{prefix}layer_norm2", width)

    def pooling_head(self, width: int, intermediate: int) -> None:
        self.tensor("head.probe", 1, 1, width)
        self.tensor("head.attention.in_proj_weight", 3 * width, width)
        self.tensor("head.attention.in_proj_bias", 3 * width)
        self.linear("head.attention.out_proj", width, width)
        self.norm("head.layernorm", width)
        self.linear("head.mlp.fc1", intermediate, width)
        self.linear("head.mlp.fc2", width, intermediate)
