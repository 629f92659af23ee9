"""Noise schedule and sampler against the recorded tables and runs; respacing rules and their error messages."""

from __future__ import annotations

import pytest
import torch

from megatron_ross.models import diffusion
from tests.helpers import golden

TABLE_FIELDS = (
    "betas",
    "alphas_cumprod",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "model_variance",
)


@pytest.fixture(scope="module")
def tables() -> diffusion.DiffusionTables:
    return diffusion.cosine_tables()


@pytest.mark.parametrize(("key", "respacing"), [("train", None), ("steps_10", "10"), ("steps_6_6_1", "6,6,1")])
def test_tables_equal_golden(tables: diffusion.DiffusionTables, key: str, respacing: str | None) -> None:
    actual = tables if respacing is None else diffusion.respace(tables, respacing)
    expected = golden.tensors("diffusion_tables.safetensors")
    for name in TABLE_FIELDS:
        torch.testing.assert_close(getattr(actual, name), expected[f"{key}.{name}"], rtol=1e-9, atol=1e-15)
    assert torch.equal(actual.timestep_map, expected[f"{key}.timestep_map"])


def test_full_respacing_is_the_training_schedule(tables: diffusion.DiffusionTables) -> None:
    full = diffusion.respace(tables, "1000")
    for name in TABLE_FIELDS:
        torch.testing.assert_close(getattr(full, name), getattr(tables, name), rtol=1e-9, atol=1e-15)
    assert torch.equal(full.timestep_map, tables.timestep_map)


@pytest.mark.parametrize("model", golden.MODELS)
@pytest.mark.parametrize("letter", ["a", "b"])
def test_q_sample_equals_golden(tables: diffusion.DiffusionTables, model: str, letter: str) -> None:
    data = golden.case(model, letter)
    z = data["out.z_q"]
    t = data["draw.t"].view(4, -1)
    x_t = diffusion.q_sample(tables, z, t, data["draw.eps"].view(4, *z.shape))
    golden.assert_close(x_t.flatten(0, 1), data["out.x_t"], 1e-6)


def test_one_step_sampler_returns_the_predicted_clean_latent(tables: diffusion.DiffusionTables) -> None:
    one = diffusion.respace(tables, 1)
    assert one.timestep_map.tolist() == [0]
    x_0 = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    x_t = diffusion.q_sample(tables, x_0, torch.zeros(2, dtype=torch.int64), eps)
    torch.testing.assert_close(diffusion.sample(lambda x, t: eps, x_t, lambda k: None, one), x_0)


def test_perfect_noise_prediction_recovers_the_clean_latent(tables: diffusion.DiffusionTables) -> None:
    """With the true noise as prediction and no added noise, every x_0 estimate is exact, so sampling must return it."""
    schedule = diffusion.respace(tables, "20")
    x_0 = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def true_eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = tables.alphas_cumprod[t][:, None]
        return (x - abar.sqrt() * x_0) / (1 - abar).sqrt()

    x_T = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = diffusion.sample(true_eps, x_T, lambda k: torch.zeros_like(x_0), schedule)
    torch.testing.assert_close(result, x_0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", ["", "0", "-3", "5,", "ddim", "2.5"])
def test_malformed_respacing_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="not a comma-separated list of positive step counts"):
        diffusion.respaced_timesteps(1000, bad)


def test_too_many_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"asks for 400 steps in section 2 of 3, which has only 333"):
        diffusion.respaced_timesteps(1000, "1,400,1")


@pytest.mark.parametrize("respacing", ["1000", "250", "7", "334,333,333", "100,50,10,1"])
def test_respaced_timesteps_are_distinct_and_ascending(respacing: str) -> None:
    kept = diffusion.respaced_timesteps(1000, respacing)
    assert len(kept) == sum(map(int, respacing.split(",")))
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    assert kept[-1] <= 999
