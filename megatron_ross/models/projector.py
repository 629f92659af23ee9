"""Projector from vision features to LLM embeddings: `identity`, `linear` or `mlpNx_gelu`, as published for LLaVA."""

from __future__ import annotations

import re

from torch import nn

from megatron_ross.config.model import ProjectorConfig


def build_projector(config: ProjectorConfig, vision_width: int, hidden_size: int) -> nn.Module:
    """Build the module; parameters are initialised as torch does by default, as published.

    Parameter names are those of published checkpoints behind `model.mm_projector.`: `weight`, `bias` for `linear`,
    `0.weight`, `2.weight`, ... for an MLP.

    Args:
        config: projector type.
        vision_width: width of the vision tower's features.
        hidden_size: width of the LLM.

    Returns:
        Module mapping [..., vision_width] to [..., hidden_size].

    Raises:
        ValueError: unknown type, or `identity` between different widths.
    """
    if config.type == "identity":
        if vision_width != hidden_size:
            raise ValueError(
                f"projector type 'identity' needs equal widths, but the vision tower has {vision_width} and the LLM "
                f"{hidden_size}; use 'linear' or 'mlp2x_gelu'"
            )
        return nn.Identity()
    if config.type == "linear":
        return nn.Linear(vision_width, hidden_size)
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", config.type)
    if match is None:
        raise ValueError(f"unknown projector type {config.type!r}; use 'identity', 'linear' or 'mlpNx_gelu'")
    layers: list[nn.Module] = [nn.Linear(vision_width, hidden_size)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
