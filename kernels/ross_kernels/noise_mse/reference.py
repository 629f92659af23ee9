"""Noising and its squared error in plain PyTorch: the definition that the kernels must reproduce.

See noise.py for the shape legend. Latents are grouped: channel c*4 + row*2 + column of a 2x2 window. Draws are indexed
in that layout, [C4, g, g]; results are token-major, [N, C4].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ross_kernels import philox
from ross_kernels.noise_mse.noise import (
    EPSILON_STREAM,
    MAX_IMAGES_PER_SAMPLE,
    POSTERIOR_STREAM,
    TIMESTEP_STREAM,
    ExplicitNoise,
    Noise,
    NoiseKeys,
    NoiseSchedule,
)


def draw(noise: NoiseKeys, *, num_timesteps: int, latent_channels: int, grid_size: int) -> ExplicitNoise:
    """All random numbers of n images, on the device of their keys."""
    epoch, sample, image = noise.keys.unbind(1)
    salt = epoch * MAX_IMAGES_PER_SAMPLE + image
    numel = latent_channels * (2 * grid_size) ** 2

    def normal(stream: int) -> Tensor:
        return philox.normal(noise.seed, torch.full_like(sample, stream), sample, salt, numel)

    stream = torch.full_like(sample, TIMESTEP_STREAM)
    t = philox.integers(noise.seed, stream, sample, salt, noise.num_draws, num_timesteps)
    n = sample.shape[0]
    return ExplicitNoise(
        t=t.t().contiguous(),
        eps=torch.stack([normal(EPSILON_STREAM + k) for k in range(noise.num_draws)]).view(
            noise.num_draws, n, 4 * latent_channels, grid_size, grid_size
        ),
        posterior=normal(POSTERIOR_STREAM).view(n, latent_channels, 2 * grid_size, 2 * grid_size),
    )


def noise_latents(
    mean: Tensor,
    logvar: Tensor,
    noise: Noise,
    schedule: NoiseSchedule,
    *,
    shift: float,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Sample z from the posterior, x_t = signal[t] (z - shift) scaling + noise[t] eps; see the public call."""
    _, channels, side, _ = mean.shape
    if isinstance(noise, NoiseKeys):
        noise = draw(noise, num_timesteps=schedule.signal.numel(), latent_channels=channels, grid_size=side // 2)
    z = (mean.float() + torch.exp(0.5 * logvar.float()) * noise.posterior - shift) * scaling
    signal, sigma = (table[noise.t][..., None, None] for table in (schedule.signal, schedule.noise))
    x_t = signal * to_tokens(group(z)) + sigma * to_tokens(noise.eps)
    return x_t.to(dtype).contiguous(), noise.t


def noise_mse(predicted: Tensor, noise: Noise) -> Tensor:
    """Sum over tokens and channels of (predicted - eps)^2, float32 [K, n]; see the public call."""
    tokens, channels = predicted.shape[2:]
    if isinstance(noise, NoiseKeys):
        # The number of timesteps does not matter for eps.
        noise = draw(noise, num_timesteps=1, latent_channels=channels // 4, grid_size=round(tokens**0.5))
    return (predicted.float() - to_tokens(noise.eps)).square().sum(dim=(2, 3))


def group(z: Tensor) -> Tensor:
    """[n, C, 2g, 2g] -> [n, C4, g, g]."""
    n, channels, height, width = z.shape
    windows = z.reshape(n, channels, height // 2, 2, width // 2, 2)  # F.pixel_unshuffle, but n may be 0
    return windows.permute(0, 1, 3, 5, 2, 4).reshape(n, channels * 4, height // 2, width // 2)


def to_tokens(grid: Tensor) -> Tensor:
    """[..., C4, g, g] -> [..., N, C4]."""
    return grid.flatten(-2).transpose(-1, -2)
