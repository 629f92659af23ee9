"""Hugging Face key layouts of whole models: the published Ross composite and stock LLaVA.

Each layout is the same set of table rows under other names, so one pair of converters serves both.
"""

from __future__ import annotations

import re

from megatron_ross.config.model import RossModelConfig
from megatron_ross.convert.mapping import TensorMapping, with_prefix
from megatron_ross.convert.names_adapters import denoiser_mappings, projector_depth, projector_mappings
from megatron_ross.convert.names_language import head_mappings, language_mappings
from megatron_ross.convert.names_vae import vae_mappings
from megatron_ross.convert.names_vision import HF_PREFIX, tower_mappings

PARTS = {
    "language": ("embedding.", "decoder.", "final_layernorm.", "output_layer."),
    "vision": ("vision.tower.",),
    "projector": ("vision.projector.",),
    "denoiser": ("denoiser.",),
    "vae": ("vae.",),
}
"""Part of the model -> prefixes of its checkpoint keys."""

VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Checkpoint keys of the tensors with a row per token."""

ROSS_PREFIXES = {
    "vision": "model.vision_tower.vision_tower." + HF_PREFIX,
    "projector": "model.mm_projector.",
    "denoiser": "model.mm_inv_projector.net.",
    "vae": "model.pixel_decoder.pixel_decoder.",
}
"""Prefixes of the parts in published composite checkpoints; the language model has its plain names."""

ROSS_IGNORED = (
    r"model\.vision_tower\.vision_tower\.vision_model\.embeddings\.position_ids",
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
LLAVA_IGNORED = (
    r"vision_tower\.vision_model\.embeddings\.position_ids",
    r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)


def part_of(key: str) -> str:
    """Part of the model that the checkpoint key belongs to."""
    return next(part for part, prefixes in PARTS.items() if key.startswith(prefixes))


def ross_mappings(config: RossModelConfig) -> list[TensorMapping]:
    """Published composite names, in the order of the published state dict."""
    rows = language_mappings(config.language)
    rows += with_prefix(tower_mappings(config.vision), ROSS_PREFIXES["vision"])
    rows += with_prefix(projector_mappings(config), ROSS_PREFIXES["projector"])
    if config.vae is not None:
        rows += with_prefix(vae_mappings(config.vae), ROSS_PREFIXES["vae"])
    rows += with_prefix(denoiser_mappings(config), ROSS_PREFIXES["denoiser"])
    return rows + head_mappings(config.language)


def llava_mappings(config: RossModelConfig) -> list[TensorMapping]:
    """Names of the hub's `LlavaForConditionalGeneration` checkpoints; no denoiser, no auto-encoder.

    Raises:
        ValueError: the projector is not two linear layers, the only kind that class has.
    """
    if projector_depth(config.projector) != 2:
        raise ValueError(
            f"stock LLaVA has a two-layer projector, this model has {config.projector.type}: export `ross`"
        )
    names = {"0": "multi_modal_projector.linear_1", "2": "multi_modal_projector.linear_2"}
    rows = with_prefix(language_mappings(config.language), "language_model.")
    rows += with_prefix(tower_mappings(config.vision), "vision_tower." + HF_PREFIX)
    for row in projector_mappings(config):
        rows.append(row.renamed(lambda name: f"{names[name.split('.')[0]]}.{name.split('.')[1]}"))
    return rows + with_prefix(head_mappings(config.language), "language_model.")


_LLAVA_RENAMES = (
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"model\.vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"model\.vision_tower\.", "vision_tower."),
    (r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)


def canonical_llava_name(name: str) -> str:
    """Hub name of a tensor in any layout that transformers has written for LLaVA (`model.language_model.*`, ...)."""
    for pattern, replacement in _LLAVA_RENAMES:
        if re.match(pattern, name):
            return re.sub("^" + pattern, replacement, name)
    return name
