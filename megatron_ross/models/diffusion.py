"""Noise schedule, forward noising and ancestral sampling of the denoising objective: pure functions over one table.

The schedule is the squared-cosine one of improved DDPM (Nichol & Dhariwal 2021), 1000 steps in training. A sampler may
keep only some of the steps ("respacing"); its tables are rebuilt from the kept cumulative products.

Shape legend: K draws per image, n images, T steps of the schedule; "..." is any trailing latent shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_ross.config.timesteps import NUM_TRAIN_TIMESTEPS, respaced_timesteps

MAX_BETA = 0.999


@dataclass(frozen=True)
class DiffusionTables:
    """Constants of a schedule with T steps: float64 tensors [T]; `timestep_map` is int64 [T].

    The caller keeps one copy per device (`tables.to(device)`).
    """

    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    model_variance: Tensor  # fixed large variance: beta, and the second posterior variance at the last sampling step
    timestep_map: Tensor  # timestep of the training schedule that step i stands for; what the denoiser is told

    @property
    def num_timesteps(self) -> int:
        return self.betas.numel()

    def to(self, device: torch.device | str) -> DiffusionTables:
        """Copy on `device`."""
        return DiffusionTables(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def cosine_tables(num_timesteps: int = NUM_TRAIN_TIMESTEPS) -> DiffusionTables:
    """The training schedule: beta_i = min(1 - f((i+1)/T) / f(i/T), 0.999) with f(s) = cos^2((s+0.008)/1.008 pi/2)."""

    def alpha_bar(s: float) -> float:
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - alpha_bar((i + 1) / num_timesteps) / alpha_bar(i / num_timesteps), MAX_BETA)
        for i in range(num_timesteps)
    ]
    return _tables_from_betas(torch.tensor(betas, dtype=torch.float64), torch.arange(num_timesteps))


def respace(tables: DiffusionTables, respacing: str | int) -> DiffusionTables:
    """The schedule that visits only some of `tables`' steps.

    Args:
        tables: a full schedule, as made by `cosine_tables`.
        respacing: see `respaced_timesteps`.

    Raises:
        ValueError: the respacing does not fit the schedule.
    """
    kept = torch.tensor(respaced_timesteps(tables.num_timesteps, respacing))
    alphas_cumprod = tables.alphas_cumprod.cpu()[kept]
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / previous
    return _tables_from_betas(betas, kept).to(tables.betas.device)


def q_sample(tables: DiffusionTables, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Noise clean latents: sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

    Args:
        tables: training schedule on the device of `x_0`.
        x_0: clean latents, float [n, ...].
        t: timesteps, int64 [K, n] (or [n]).
        eps: standard normal noise, float [K, n, ...] (or [n, ...]).

    Returns:
        Noised latents, shape and dtype of `eps`.
    """
    signal = _at(tables.sqrt_alphas_cumprod, t, eps)
    noise = _at(tables.sqrt_one_minus_alphas_cumprod, t, eps)
    return signal * x_0 + noise * eps


@torch.no_grad()
def sample_steps(
    eps_model: Callable[[Tensor, Tensor], Tensor],
    x_T: Tensor,
    noise_fn: Callable[[int], Tensor],
    tables: DiffusionTables,
) -> Iterator[Tensor]:
    """DDPM ancestral sampling without clipping of the predicted x_0, with fixed large variance; yields every state.

    Args:
        eps_model: `(x [n, ...], t int64 [n]) -> predicted noise [n, ...]`; t counts in training timesteps.
        x_T: initial standard normal noise, float [n, ...].
        noise_fn: `noise_fn(k)` is the noise [n, ...] of the k-th step (0 = noisiest). Not asked for at the last step.
        tables: schedule to follow, usually from `respace`, on the device of `x_T`.

    Yields:
        The sample after each step, [n, ...]; the last one is the result.
    """
    x = x_T
    n = x.shape[0]
    for k, i in enumerate(reversed(range(tables.num_timesteps))):
        step = torch.full((n,), i, device=x.device)
        eps = eps_model(x, tables.timestep_map[step])
        x_0 = (
            _at(tables.sqrt_recip_alphas_cumprod, step, x) * x - _at(tables.sqrt_recipm1_alphas_cumprod, step, x) * eps
        )
        x = _at(tables.posterior_mean_coef1, step, x) * x_0 + _at(tables.posterior_mean_coef2, step, x) * x
        if i > 0:
            x = x + _at(tables.model_variance.sqrt(), step, x) * noise_fn(k)
        yield x


def sample(
    eps_model: Callable[[Tensor, Tensor], Tensor],
    x_T: Tensor,
    noise_fn: Callable[[int], Tensor],
    tables: DiffusionTables,
) -> Tensor:
    """Last state of `sample_steps`: the clean latents, [n, ...]."""
    x = x_T
    for x in sample_steps(eps_model, x_T, noise_fn, tables):  # noqa: B007  (only the last state is wanted)
        pass
    return x


def _tables_from_betas(betas: Tensor, timestep_map: Tensor) -> DiffusionTables:
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    return DiffusionTables(
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        sqrt_alphas_cumprod=alphas_cumprod.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),
        sqrt_recip_alphas_cumprod=(1 / alphas_cumprod).sqrt(),
        sqrt_recipm1_alphas_cumprod=(1 / alphas_cumprod - 1).sqrt(),
        posterior_variance=posterior_variance,
        posterior_mean_coef1=betas * previous.sqrt() / (1 - alphas_cumprod),
        posterior_mean_coef2=(1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        model_variance=torch.cat([posterior_variance[1:2], betas[1:]]) if betas.numel() > 1 else betas.clone(),
        timestep_map=timestep_map,
    )


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """`table[t]` in the dtype of `like`, with trailing dimensions of size 1 so that it broadcasts against it."""
    values = table[t].to(like.dtype)
    return values.reshape(*values.shape, *[1] * (like.dim() - values.dim()))
