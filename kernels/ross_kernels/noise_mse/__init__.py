"""Noised VAE latents and the squared error of a noise prediction, with random numbers that nobody stores.

Public calls: `noise_latents`, `noise_mse`. Both check their inputs, then run the Triton kernels (`use_triton=True`) or
the PyTorch definition in reference.py; both give the same numbers, up to rounding. See noise.py for the shape legend.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ross_kernels.checks import FLOAT_DTYPES, require_dtype, require_one_device, require_runnable, require_shape
from ross_kernels.noise_mse import reference
from ross_kernels.noise_mse.noise import ExplicitNoise, Noise, NoiseKeys, NoiseSchedule

__all__ = ["ExplicitNoise", "Noise", "NoiseKeys", "NoiseSchedule", "noise_latents", "noise_mse"]


@torch.no_grad()
def noise_latents(
    mean: Tensor,
    logvar: Tensor,
    noise: Noise,
    schedule: NoiseSchedule,
    *,
    shift: float,
    scaling: float,
    dtype: torch.dtype = torch.float32,
    use_triton: bool,
) -> tuple[Tensor, Tensor]:
    """K noised copies of a posterior sample of n images, token-major. Not differentiable.

    Args:
        mean, logvar: moments of the VAE posterior, fp16, bf16 or fp32 [n, C, 2g, 2g]; n may be 0.
        noise: keys, or explicit numbers.
        schedule: coefficients of signal and noise.
        shift, scaling: latents enter diffusion as (z - shift) * scaling.
        dtype: of the result; arithmetic is float32.
        use_triton: run the kernels, not the definition.

    Returns:
        x_t `dtype` [K, n, N, C4] and the timesteps, int64 [K, n].

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_moments(mean, logvar)
    n, channels, side, _ = mean.shape
    _check_noise(noise, noise.shape[0], n, 4 * channels, side // 2)
    _check_schedule(schedule)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype}, but must be one of {', '.join(map(str, FLOAT_DTYPES))}")
    tensors = {"mean": mean, "logvar": logvar, "schedule.signal": schedule.signal, "schedule.noise": schedule.noise}
    require_one_device(tensors | _tensors_of(noise))
    if not use_triton:
        return reference.noise_latents(mean, logvar, noise, schedule, shift=shift, scaling=scaling, dtype=dtype)
    from ross_kernels.noise_mse import triton_impl  # needs Triton, which CPU installations may lack

    require_runnable(mean, triton_impl.INTERPRETED)
    return triton_impl.noise_latents(mean, logvar, noise, schedule, shift=shift, scaling=scaling, dtype=dtype)


def noise_mse(predicted: Tensor, noise: Noise, *, use_triton: bool) -> tuple[Tensor, Tensor]:
    """Squared error of a prediction against the eps of the same `noise`, per draw and image.

    Args:
        predicted: fp16, bf16 or fp32 [K, n, N, C4], token-major as `noise_latents` returns x_t; n may be 0.
        noise: what `noise_latents` was given.
        use_triton: run the kernels, not the definition.

    Returns:
        Sums over tokens and channels, float32 [K, n], differentiable once with respect to `predicted`; and the number
        of elements in each, int64 [K, n].

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if predicted.dim() != 4:
        raise ValueError(f"predicted has shape {list(predicted.shape)}, but must be [K, n, N, C4]")
    require_dtype("predicted", predicted, FLOAT_DTYPES)
    num_draws, n, tokens, channels = predicted.shape
    grid_size = math.isqrt(tokens)
    if grid_size**2 != tokens or channels % 4:
        raise ValueError(
            f"predicted has {tokens} tokens of {channels} channels, but needs g * g tokens of 4 C channels"
        )
    _check_noise(noise, num_draws, n, channels, grid_size)
    require_one_device({"predicted": predicted} | _tensors_of(noise))
    counts = torch.full((num_draws, n), tokens * channels, device=predicted.device)
    if not use_triton:
        return reference.noise_mse(predicted, noise), counts
    from ross_kernels.noise_mse import autograd  # needs Triton, which CPU installations may lack

    require_runnable(predicted, autograd.triton_impl.INTERPRETED)
    return autograd.NoiseMse.apply(predicted, noise), counts


def _check_moments(mean: Tensor, logvar: Tensor) -> None:
    if mean.dim() != 4 or mean.shape[2] != mean.shape[3] or mean.shape[2] % 2 or not mean.shape[1] * mean.shape[2]:
        raise ValueError(f"mean has shape {list(mean.shape)}, but must be [n, C, 2g, 2g] with C and g above zero")
    require_shape("logvar", logvar, tuple(mean.shape), "that of mean")
    require_dtype("mean", mean, FLOAT_DTYPES)
    require_dtype("logvar", logvar, (mean.dtype,))


def _check_noise(noise: Noise, num_draws: int, n: int, channels: int, grid_size: int) -> None:
    if num_draws < 1 or noise.shape[0] != num_draws:
        raise ValueError(f"noise has K = {noise.shape[0]} draws per image, but must have {max(num_draws, 1)}")
    if isinstance(noise, NoiseKeys):
        require_shape("noise.keys", noise.keys, (n, 3), "[n, 3]")
        require_dtype("noise.keys", noise.keys, (torch.int64,))
        return
    require_shape("noise.t", noise.t, (num_draws, n), "[K, n]")
    require_shape("noise.eps", noise.eps, (num_draws, n, channels, grid_size, grid_size), "[K, n, C4, g, g]")
    side = 2 * grid_size
    require_shape("noise.posterior", noise.posterior, (n, channels // 4, side, side), "[n, C, 2g, 2g]")
    require_dtype("noise.t", noise.t, (torch.int64,))
    require_dtype("noise.eps", noise.eps, (torch.float32,))
    require_dtype("noise.posterior", noise.posterior, (torch.float32,))


def _check_schedule(schedule: NoiseSchedule) -> None:
    if schedule.signal.dim() != 1 or not schedule.signal.numel():
        raise ValueError(f"schedule.signal has shape {list(schedule.signal.shape)}, but must be [T] with T above zero")
    require_shape("schedule.noise", schedule.noise, tuple(schedule.signal.shape), "that of schedule.signal")
    require_dtype("schedule.signal", schedule.signal, (torch.float32,))
    require_dtype("schedule.noise", schedule.noise, (torch.float32,))


def _tensors_of(noise: Noise) -> dict[str, Tensor]:
    if isinstance(noise, NoiseKeys):
        return {"noise.keys": noise.keys}
    return {"noise.t": noise.t, "noise.eps": noise.eps, "noise.posterior": noise.posterior}
