"""The choice between kernels and definitions, and that a denoising step does not change with it."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from torch import Tensor

from megatron_ross import ops
from megatron_ross.config.model import DenoiserConfig
from megatron_ross.data.batch import NoiseDraws
from megatron_ross.losses import recon_loss_sum
from megatron_ross.models.denoiser import RossDenoiser
from megatron_ross.models.diffusion import cosine_tables, q_sample
from megatron_ross.models.latents import group_latents

CHANNELS, GRID, DRAWS, SEED = 2, 3, 2, 77
SHIFT, SCALING = 0.1159, 0.3611


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels everywhere, which on CPU means interpreted ones."""
    monkeypatch.setattr(ops, "use_triton", lambda device_type: True)


@pytest.fixture
def fresh_choice() -> None:
    ops.use_triton.cache_clear()


def schedule(device: str) -> ops.NoiseSchedule:
    tables = cosine_tables().to(device)
    return ops.NoiseSchedule(tables.sqrt_alphas_cumprod.float(), tables.sqrt_one_minus_alphas_cumprod.float())


def inputs(n: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, logvar, condition, noise keys"""
    generator = torch.Generator().manual_seed(n)
    mean, logvar = torch.randn(2, n, CHANNELS, 2 * GRID, 2 * GRID, generator=generator).to(device)
    condition = torch.randn(n, GRID**2, 24, generator=generator).to(device)
    keys = torch.arange(3 * n).view(n, 3).to(device)
    return mean, logvar, condition, keys


def noise_of(keys: Tensor) -> ops.Noise:
    return ops.image_noise(SEED, keys, num_draws=DRAWS, num_timesteps=1000, latent_channels=CHANNELS, grid_size=GRID)


def step(n: int, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one denoising step on n images."""
    torch.manual_seed(0)
    denoiser = RossDenoiser(DenoiserConfig(depth=1, width=16, num_heads=2), 4 * CHANNELS, 24, GRID)
    for parameter in denoiser.parameters():  # the published initialisation would predict zero
        torch.nn.init.normal_(parameter, std=0.3)
    denoiser.to(device)
    mean, logvar, condition, keys = inputs(n, device)
    noise = noise_of(keys)
    x_t, t = ops.noise_latents(mean, logvar, noise, schedule(device), shift=SHIFT, scaling=SCALING, dtype=torch.float32)
    loss = recon_loss_sum(*ops.score(denoiser(x_t, t, condition, token_major=True), noise), torch.ones(n).to(device))
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in denoiser.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("n", [1, 3])
def test_a_step_is_the_same_with_kernels(device: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "use_triton", lambda device_type: False)
    loss, gradients = step(n, device)
    monkeypatch.setattr(ops, "use_triton", lambda device_type: True)
    loss_kernels, gradients_kernels = step(n, device)
    torch.testing.assert_close(loss_kernels, loss, rtol=1e-5, atol=0)
    assert gradients.keys() == gradients_kernels.keys()
    for name, gradient in gradients.items():
        allowed = 1e-4 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(gradients_kernels[name], gradient, rtol=0, atol=allowed, msg=name)


def test_kernels_draw_what_the_definition_draws(device: str, kernels: None) -> None:
    """The numbers of `draw_noise`, put in explicitly on the definition's path, against keys on the kernels' path."""
    mean, logvar, _, keys = inputs(2, device)
    noise = noise_of(keys)
    assert isinstance(noise, type(ops.noise_mse.NoiseKeys(0, keys, 1))), "kernels get keys, not numbers"
    settings = {"shift": SHIFT, "scaling": SCALING, "dtype": torch.float32}
    x_t, t = ops.noise_latents(mean, logvar, noise, schedule(device), **settings)
    drawn = ops.draw_noise(SEED, keys, num_draws=DRAWS, num_timesteps=1000, latent_channels=CHANNELS, grid_size=GRID)
    assert torch.equal(drawn.t, t)
    z = group_latents((mean + torch.exp(0.5 * logvar) * drawn.posterior - SHIFT) * SCALING)
    expected = q_sample(cosine_tables().to(device), z, drawn.t, drawn.eps)
    torch.testing.assert_close(x_t, expected.flatten(3).transpose(2, 3), rtol=1e-5, atol=1e-5)


def test_recorded_draws_can_be_put_in(device: str, kernels: None) -> None:
    mean, logvar, _, _ = inputs(2, device)
    side = 2 * GRID
    draws = NoiseDraws(
        t=torch.tensor([[0, 999], [5, 500]], device=device),
        eps=torch.randn(DRAWS, 2, 4 * CHANNELS, GRID, GRID, device=device),
        posterior=torch.randn(2, CHANNELS, side, side, device=device),
    )
    noise = ops.explicit_noise(draws)
    settings = {"shift": SHIFT, "scaling": SCALING, "dtype": torch.float32}
    x_t, t = ops.noise_latents(mean, logvar, noise, schedule(device), **settings)
    assert torch.equal(t, draws.t)
    sums, counts = ops.score(torch.zeros_like(x_t), noise)
    torch.testing.assert_close(sums, draws.eps.square().sum(dim=(2, 3, 4)))
    assert (counts == GRID**2 * 4 * CHANNELS).all()


@pytest.mark.usefixtures("fresh_choice")
def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="megatron_ross.ops"):
        assert [ops.use_triton("cpu") for _ in range(3)] == [False] * 3
        assert ops.use_triton("cuda")
    assert [record.getMessage() for record in caplog.records] == [
        "noising, noise error and adaLN: PyTorch (tensors are on cpu, and the kernels need CUDA)",
        "noising, noise error and adaLN: Triton kernels (CUDA and Triton are there)",
    ]


@pytest.mark.usefixtures("fresh_choice")
def test_cuda_without_triton_is_a_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not ops.use_triton("cuda")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pip install -e '.[gpu]'" in caplog.text
    ops.use_triton.cache_clear()
