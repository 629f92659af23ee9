"""Freshly initialised projector and denoiser with published key names, reproducible from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ross.config.model import RossModelConfig
from megatron_ross.convert.names_adapters import LATENT_WINDOW
from megatron_ross.models.denoiser import RossDenoiser
from megatron_ross.models.projector import build_projector


def fresh_projector(model: RossModelConfig, seed: int) -> dict[str, Tensor]:
    """float32 tensors named as behind `mm_projector.`; torch's default initialisation, as published."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_projector(model.projector, model.vision.hidden_size, model.language.hidden_size)
    return dict(module.state_dict())


def fresh_denoiser(model: RossModelConfig, seed: int) -> dict[str, Tensor]:
    """float32 tensors named as behind `mm_inv_projector.`, with the published initialisation.

    Raises:
        ValueError: the model has no denoiser.
    """
    if model.denoiser is None or model.vae is None:
        raise ValueError("the model has no denoiser: give an auto-encoder")
    channels = LATENT_WINDOW * model.vae.latent_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = RossDenoiser(model.denoiser, channels, model.language.hidden_size, model.vision.grid_size)
        module.init_weights(torch.Generator().manual_seed(seed))
    return {f"net.{name}": tensor for name, tensor in module.state_dict().items()}
