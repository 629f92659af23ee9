"""The one place that reaches into `ross_kernels` and chooses between Triton kernels and their PyTorch definitions.

On CUDA the kernels run, elsewhere the definitions; the choice is logged once per device type. Both give the same
numbers, up to rounding: random draws belong to the sample, whoever computes them.

Shape legend: n images, K draws per image, C latent channels, g patches per side, N = g*g tokens, C4 = 4 C.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from ross_kernels import adaln, noise_mse
from ross_kernels.noise_mse import Noise, NoiseSchedule, reference
from torch import Tensor

from megatron_ross.data.batch import NoiseDraws

__all__ = [
    "Noise",
    "NoiseSchedule",
    "draw_noise",
    "explicit_noise",
    "gated_residual",
    "image_noise",
    "kernel_choice",
    "layernorm_modulate",
    "noise_latents",
    "score",
    "use_triton",
]

logger = logging.getLogger(__name__)


def kernel_choice(device_type: str) -> tuple[bool, str]:
    """Whether the Triton kernels run on tensors of this device type, and why."""
    if device_type != "cuda":
        return False, f"tensors are on {device_type}, and the kernels need CUDA"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed; pip install -e '.[gpu]'"
    return True, "CUDA and Triton are there"


@functools.cache
def use_triton(device_type: str) -> bool:
    """`kernel_choice`, which is logged the first time it is needed."""
    chosen, why = kernel_choice(device_type)
    level = logging.WARNING if device_type == "cuda" and not chosen else logging.INFO
    logger.log(level, "noising, noise error and adaLN: %s (%s)", "Triton kernels" if chosen else "PyTorch", why)
    return chosen


def draw_noise(
    seed: int,
    noise_keys: Tensor,
    *,
    num_draws: int,
    num_timesteps: int,
    latent_channels: int,
    grid_size: int,
) -> NoiseDraws:
    """All random numbers of n images, on the device of `noise_keys` (int64 [n, 3]: epoch, sample id, image index).

    Returns t int64 [K, n], eps float32 [K, n, C4, g, g] and posterior float32 [n, C, 2g, 2g]; each a function of the
    run seed and the image's key only.
    """
    keys = noise_mse.NoiseKeys(seed, noise_keys, num_draws)
    drawn = reference.draw(keys, num_timesteps=num_timesteps, latent_channels=latent_channels, grid_size=grid_size)
    return NoiseDraws(drawn.t, drawn.eps, drawn.posterior)


def explicit_noise(draws: NoiseDraws) -> Noise:
    """Noise that is given, as recorded cases do."""
    return noise_mse.ExplicitNoise(draws.t, draws.eps, draws.posterior)


def image_noise(
    seed: int,
    noise_keys: Tensor,
    *,
    num_draws: int,
    num_timesteps: int,
    latent_channels: int,
    grid_size: int,
) -> Noise:
    """Noise of n images for `noise_latents` and `score`; arguments as for `draw_noise`.

    The kernels draw numbers where they use them, so they get the keys. The definition gets the numbers: it would draw
    them three times otherwise.
    """
    if use_triton(noise_keys.device.type):
        return noise_mse.NoiseKeys(seed, noise_keys, num_draws)
    drawn = draw_noise(
        seed,
        noise_keys,
        num_draws=num_draws,
        num_timesteps=num_timesteps,
        latent_channels=latent_channels,
        grid_size=grid_size,
    )
    return explicit_noise(drawn)


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
    """Posterior moments [n, C, 2g, 2g] -> noised latents `dtype` [K, n, N, C4] and timesteps int64 [K, n]."""
    return noise_mse.noise_latents(
        mean,
        logvar,
        noise,
        schedule,
        shift=shift,
        scaling=scaling,
        dtype=dtype,
        use_triton=use_triton(mean.device.type),
    )


def score(predicted: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """Squared error of predicted noise [K, n, N, C4]: sums float32 [K, n] and how many elements are in each."""
    return noise_mse.noise_mse(predicted, noise, use_triton=use_triton(predicted.device.type))


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine parameters, then x * (1 + scale) + shift; all [..., D] of one dtype."""
    return adaln.layernorm_modulate(x, shift, scale, eps=eps, use_triton=use_triton(x.device.type))


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y; all [..., D] of one dtype."""
    return adaln.gated_residual(x, gate, y, use_triton=use_triton(x.device.type))
