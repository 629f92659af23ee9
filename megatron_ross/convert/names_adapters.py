"""Name tables of the trained adapters: the projector (`mm_projector`) and the denoiser (`mm_inv_projector.net`)."""

from __future__ import annotations

import re

from megatron_ross.config.model import DenoiserConfig, ProjectorConfig, RossModelConfig
from megatron_ross.convert.mapping import TensorMapping, direct

LATENT_WINDOW = 4
"""Latent cells (2 x 2) that are grouped into the channels of one denoiser token."""


def projector_depth(config: ProjectorConfig) -> int:
    """Number of linear layers: 0 for `identity`, 1 for `linear`, N for `mlpNx_gelu`.

    Raises:
        ValueError: another type.
    """
    fixed = {"identity": 0, "linear": 1}
    if config.type in fixed:
        return fixed[config.type]
    match = re.fullmatch(r"mlp([1-9])x_gelu", config.type)
    if match is None:
        raise ValueError(f"projector type {config.type!r} is unknown: use identity, linear or mlpNx_gelu (N = 1..9)")
    return int(match[1])


def projector_mappings(config: RossModelConfig) -> list[TensorMapping]:
    """Names below `mm_projector.`: "weight" for `linear`; else the linear layers at 0, 2, 4, ... of the sequence."""
    rows: list[TensorMapping] = []
    width = config.vision.hidden_size
    for layer in range(projector_depth(config.projector)):
        prefix = "" if config.projector.type == "linear" else f"{2 * layer}."
        for name, shape in (("weight", (config.language.hidden_size, width)), ("bias", (config.language.hidden_size,))):
            rows.append(direct(f"vision.projector.{prefix}{name}", f"{prefix}{name}", *shape))
        width = config.language.hidden_size
    return rows


def denoiser_mappings(config: RossModelConfig) -> list[TensorMapping]:
    """Names below `mm_inv_projector.net.`, in the order of the published state dict; empty without a denoiser."""
    if config.denoiser is None or config.vae is None:
        return []
    denoiser, width = config.denoiser, config.denoiser.width
    channels = LATENT_WINDOW * config.vae.latent_channels
    rows = _Rows()
    rows.tensor("pos_embed", 1, config.vision.num_image_tokens, width)
    rows.tensor("x_embedder.proj.weight", width, channels, 1, 1)
    rows.tensor("x_embedder.proj.bias", width)
    rows.linear("t_embedder.mlp.0", width, denoiser.frequency_embedding_size)
    rows.linear("t_embedder.mlp.2", width, width)
    rows.linear("z_embedder.1", width, config.language.hidden_size)
    for index in range(denoiser.depth):
        rows.block(f"blocks.{index}.", denoiser)
    rows.linear("final_layer.linear", channels, width)
    rows.linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return rows.mappings


class _Rows:
    """Collects table rows; a denoiser tensor has the same name on both sides."""

    def __init__(self) -> None:
        self.mappings: list[TensorMapping] = []

    def tensor(self, name: str, *shape: int) -> None:
        self.mappings.append(direct(f"denoiser.{name}", name, *shape))

    def linear(self, name: str, outputs: int, inputs: int) -> None:
        self.tensor(f"{name}.weight", outputs, inputs)
        self.tensor(f"{name}.bias", outputs)

    def block(self, prefix: str, config: DenoiserConfig) -> None:
        width, mlp = config.width, int(config.width * config.mlp_ratio)
        self.linear(f"{prefix}attn.qkv", 3 * width, width)
        self.linear(f"{prefix}attn.proj", width, width)
        self.linear(f"{prefix}mlp.fc1", mlp, width)
        self.linear(f"{prefix}mlp.fc2", width, mlp)
        self.linear(f"{prefix}adaLN_modulation.1", 6 * width, width)
