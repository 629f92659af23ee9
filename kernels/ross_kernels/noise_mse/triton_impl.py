"""Noising and its squared error as Triton kernels. See noise.py for the shape legend, README.md for maths and traffic.

One Philox call gives four normal numbers, consecutive in the [C4, g, g] layout in which draws are indexed, while the
tensors in memory are token-major. A program therefore owns a tile of draw blocks: per channel, BLOCK groups of four
consecutive tokens, starting where that channel's groups start. With odd N this start differs by channel, so tile
positions outside the channel are masked; every element belongs to exactly one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ross_kernels.noise_mse.noise import (
    EPSILON_STREAM,
    MAX_IMAGES_PER_SAMPLE,
    POSTERIOR_STREAM,
    TIMESTEP_STREAM,
    ExplicitNoise,
    Noise,
    NoiseSchedule,
)
from ross_kernels.philox_triton import integer, normal_at, normal_block

DEFAULT_BLOCK = 4
"""Draw blocks (of four tokens) per channel and program."""

_POSTERIOR = tl.constexpr(POSTERIOR_STREAM)
_TIMESTEP = tl.constexpr(TIMESTEP_STREAM)
_EPSILON = tl.constexpr(EPSILON_STREAM)
_IMAGES = tl.constexpr(MAX_IMAGES_PER_SAMPLE)


@triton.jit
def _key(keys, image):
    """(sample, salt), uint32 scalars, of one row of int64 keys [n, 3]."""
    row = keys + image.to(tl.int64) * 3
    return tl.load(row + 1).to(tl.uint32), (tl.load(row) * _IMAGES + tl.load(row + 2)).to(tl.uint32)


@triton.jit
def _tile(tokens, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program's tile [BLOCK, BLOCK_C]: draw block, token of its first number (may be negative), channel."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    first = channel * tokens
    block = first // 4 + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    return block, block * 4 - first, channel + block * 0


@triton.jit
def _inside(token, channel, tokens, channels):
    return (token >= 0) & (token < tokens) & (channel < channels)


@triton.jit
def _latent(
    mean, logvar, noise_or_seed_low, seed_high, sample, salt, image, token, channel,
    channels, grid_size, shift, scaling, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """Scaled posterior sample, float32, at (token, channel) of the grouped layout."""
    mask = _inside(token, channel, grid_size * grid_size, channels)
    row = 2 * (token // grid_size) + (channel & 2) // 2
    column = 2 * (token % grid_size) + (channel & 1)
    index = ((channel // 4) * 2 * grid_size + row) * 2 * grid_size + column
    offset = image.to(tl.int64) * channels * grid_size * grid_size + index
    if EXPLICIT:
        noise = tl.load(noise_or_seed_low + offset, mask=mask, other=0.0)
    else:
        noise = normal_at(noise_or_seed_low, seed_high, index, _POSTERIOR, sample, salt)
    centre = tl.load(mean + offset, mask=mask, other=0.0).to(tl.float32)
    spread = tl.exp(0.5 * tl.load(logvar + offset, mask=mask, other=0.0).to(tl.float32))
    return (centre + spread * noise - shift) * scaling


@triton.jit
def _load_block(eps, row, block, token, channel, tokens, channels):
    """Four consecutive numbers per draw block of explicit noise [rows, C4, N]."""
    at = eps + row * tokens * channels + block * 4
    e0 = tl.load(at, mask=_inside(token, channel, tokens, channels), other=0.0)
    e1 = tl.load(at + 1, mask=_inside(token + 1, channel, tokens, channels), other=0.0)
    e2 = tl.load(at + 2, mask=_inside(token + 2, channel, tokens, channels), other=0.0)
    e3 = tl.load(at + 3, mask=_inside(token + 3, channel, tokens, channels), other=0.0)
    return e0, e1, e2, e3


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _noise_kernel(
    x_t, t_out, mean, logvar, signal, sigma, keys, t_in, eps, posterior,
    seed_low, seed_high, num_images, num_draws, num_timesteps, channels, grid_size, shift, scaling,
    EXPLICIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x_t = signal[t] z + sigma[t] eps for all draws of one image and tile; the posterior sample z stays in registers.

    x_t: any float [K, n, N, C4]; t_out: int64 [K, n]; mean, logvar: any float [n, C, 2g, 2g]; signal, sigma: fp32 [T];
    keys: int64 [n, 3]; or, EXPLICIT, t_in: int64 [K, n], eps: fp32 [K, n, C4, N], posterior: fp32 [n, C, 2g, 2g].
    Grid: (n, tiles).
    """
    image = tl.program_id(0)
    tokens = grid_size * grid_size
    block, token, channel = _tile(tokens, BLOCK, BLOCK_C)
    if EXPLICIT:
        sample, salt, source = 0, 0, posterior
    else:
        sample, salt = _key(keys, image)
        source = seed_low
    z0 = _latent(mean, logvar, source, seed_high, sample, salt, image, token, channel,
                 channels, grid_size, shift, scaling, EXPLICIT)  # fmt: skip
    z1 = _latent(mean, logvar, source, seed_high, sample, salt, image, token + 1, channel,
                 channels, grid_size, shift, scaling, EXPLICIT)  # fmt: skip
    z2 = _latent(mean, logvar, source, seed_high, sample, salt, image, token + 2, channel,
                 channels, grid_size, shift, scaling, EXPLICIT)  # fmt: skip
    z3 = _latent(mean, logvar, source, seed_high, sample, salt, image, token + 3, channel,
                 channels, grid_size, shift, scaling, EXPLICIT)  # fmt: skip
    z = (z0, z1, z2, z3)
    for k in range(num_draws):
        row = image.to(tl.int64) + k * num_images
        if EXPLICIT:
            t = tl.load(t_in + row)
            e = _load_block(eps, row, block, token, channel, tokens, channels)
        else:
            t = integer(seed_low, seed_high, k, _TIMESTEP, sample, salt, num_timesteps)
            e = normal_block(seed_low, seed_high, block, _EPSILON + k, sample, salt)
        a, b = tl.load(signal + t), tl.load(sigma + t)
        at = x_t + row * tokens * channels + token * channels + channel
        for lane in tl.static_range(4):
            inside = _inside(token + lane, channel, tokens, channels)
            tl.store(at + lane * channels, (a * z[lane] + b * e[lane]).to(x_t.dtype.element_ty), mask=inside)
        tl.store(t_out + row, t, mask=tl.program_id(1) == 0)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _mse_kernel(
    result, predicted, row_grad, keys, eps, seed_low, seed_high, num_images, channels, tokens,
    BACKWARD: tl.constexpr, EXPLICIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Squared error of `predicted` [K, n, N, C4] against eps, which is drawn again here and never stored.

    Forward: result fp32 [K * n, tiles] gets this tile's sum. BACKWARD: result, like `predicted`, gets
    2 (predicted - eps) row_grad[row]. Grid: (K * n, tiles).
    """
    row = tl.program_id(0).to(tl.int64)
    block, token, channel = _tile(tokens, BLOCK, BLOCK_C)
    if EXPLICIT:
        e = _load_block(eps, row, block, token, channel, tokens, channels)
    else:
        image = tl.program_id(0) % num_images
        sample, salt = _key(keys, image)
        e = normal_block(seed_low, seed_high, block, _EPSILON + tl.program_id(0) // num_images, sample, salt)
    at = row * tokens * channels + token * channels + channel
    total = tl.full((BLOCK, BLOCK_C), 0.0, tl.float32)
    if BACKWARD:
        factor = 2.0 * tl.load(row_grad + row)
    for lane in tl.static_range(4):
        inside = _inside(token + lane, channel, tokens, channels)
        value = tl.load(predicted + at + lane * channels, mask=inside, other=0.0).to(tl.float32)
        error = tl.where(inside, value - e[lane], 0.0)
        if BACKWARD:
            gradient = (factor * error).to(result.dtype.element_ty)
            tl.store(result + at + lane * channels, gradient, mask=inside)
        else:
            total += error * error
    if not BACKWARD:
        tl.store(result + row * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(total, axis=1), axis=0))


INTERPRETED = not isinstance(_noise_kernel, triton.runtime.JITFunction)


def _num_tiles(tokens: int, block: int) -> int:
    """Tiles that cover every channel: its first draw block may begin up to three tokens before it."""
    return triton.cdiv((tokens + 6) // 4, block)


def _tile_shape(block: int, channels: int) -> dict[str, int]:
    """Sizes of a tile and a thread for each of its elements: more per thread, and the code outgrows the caches."""
    width = triton.next_power_of_2(channels)
    return {"BLOCK": block, "BLOCK_C": width, "num_warps": min(max(block * width // 32, 1), 8)}


def _arguments(noise: Noise, unused: Tensor) -> tuple[bool, Tensor, Tensor, Tensor, Tensor, int, int]:
    """(explicit, keys, t, eps, posterior, low and high half of the seed); `unused` stands for what is not there."""
    if isinstance(noise, ExplicitNoise):
        return True, unused, noise.t.contiguous(), noise.eps.contiguous(), noise.posterior.contiguous(), 0, 0
    low, high = noise.seed & 0xFFFFFFFF, (noise.seed >> 32) & 0xFFFFFFFF
    return False, noise.keys.contiguous(), unused, unused, unused, low, high


def noise_latents(
    mean: Tensor,
    logvar: Tensor,
    noise: Noise,
    schedule: NoiseSchedule,
    *,
    shift: float,
    scaling: float,
    dtype: torch.dtype,
    block: int = DEFAULT_BLOCK,
) -> tuple[Tensor, Tensor]:
    """`reference.noise_latents` in one pass. Inputs are checked by the public call."""
    (num_draws, n), channels, grid_size = noise.shape, 4 * mean.shape[1], mean.shape[-1] // 2
    x_t = torch.empty(num_draws, n, grid_size**2, channels, dtype=dtype, device=mean.device)
    t = torch.empty(num_draws, n, dtype=torch.int64, device=mean.device)
    if x_t.numel():
        explicit, keys, t_in, eps, posterior, low, high = _arguments(noise, mean)
        _noise_kernel[(n, _num_tiles(grid_size**2, block))](
            x_t, t, mean.contiguous(), logvar.contiguous(), schedule.signal, schedule.noise,
            keys, t_in, eps, posterior, low, high, n, num_draws, schedule.signal.numel(), channels, grid_size,
            shift, scaling, EXPLICIT=explicit, **_tile_shape(block, channels),
        )  # fmt: skip
    return x_t, t


def mse_sums(predicted: Tensor, noise: Noise, *, block: int = DEFAULT_BLOCK) -> Tensor:
    """`reference.noise_mse`: float32 [K, n]. The order of summation is fixed, so results repeat exactly."""
    num_draws, n, tokens, _ = predicted.shape
    tiles = _num_tiles(tokens, block)
    sums = torch.empty(num_draws, n, tiles, dtype=torch.float32, device=predicted.device)
    if predicted.numel():
        _launch_mse(sums, predicted, None, noise, tiles, block)
    return sums.sum(-1)


def mse_backward(row_grad: Tensor, predicted: Tensor, noise: Noise, *, block: int = DEFAULT_BLOCK) -> Tensor:
    """Gradient of `mse_sums` with respect to `predicted`, given that of its result [K, n]."""
    gradient = torch.empty_like(predicted)
    if predicted.numel():
        _launch_mse(gradient, predicted, row_grad.contiguous(), noise, _num_tiles(predicted.shape[2], block), block)
    return gradient


def _launch_mse(
    result: Tensor, predicted: Tensor, row_grad: Tensor | None, noise: Noise, tiles: int, block: int
) -> None:
    num_draws, n, tokens, channels = predicted.shape
    explicit, keys, _, eps, _, low, high = _arguments(noise, predicted)
    _mse_kernel[(num_draws * n, tiles)](
        result, predicted, predicted if row_grad is None else row_grad, keys, eps, low, high, n, channels, tokens,
        BACKWARD=row_grad is not None, EXPLICIT=explicit, **_tile_shape(block, channels),
    )  # fmt: skip
