"""Noising and its squared error: kernels against the definition, statistics of the draws, refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from ross_kernels import noise_mse
from ross_kernels.checks import require_runnable
from ross_kernels.noise_mse import ExplicitNoise, Noise, NoiseKeys, NoiseSchedule, reference
from torch import Tensor

SHIFT, SCALING = 0.1159, 0.3611
STEPS = 1000
SEED = 0x1234567_89ABCDEF
# n images, K draws, C latent channels, g patches per side, dtype of the moments, dtype of the tokens
CASES = [
    (1, 1, 16, 3, torch.float32, torch.float32),
    (3, 4, 5, 3, torch.float16, torch.bfloat16),
    (3, 1, 3, 7, torch.bfloat16, torch.float16),
    (1, 4, 1, 1, torch.float32, torch.float32),
    (1, 4, 4, 6, torch.bfloat16, torch.bfloat16),
    (0, 1, 16, 3, torch.float32, torch.float32),
    (0, 4, 4, 5, torch.float16, torch.bfloat16),
]


def keys_of(n: int, num_draws: int, device: str) -> NoiseKeys:
    """Large sample ids, several epochs, several images of a sample."""
    rows = [(i % 2, 2**31 + 5 * (i // 2), i % 2) for i in range(n)]
    return NoiseKeys(SEED, torch.tensor(rows, dtype=torch.int64, device=device).view(n, 3), num_draws)


def moments(n: int, channels: int, grid_size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + channels)
    mean, logvar = torch.randn(2, n, channels, 2 * grid_size, 2 * grid_size, generator=generator).to(device, dtype)
    return mean, logvar


def schedule(device: str) -> NoiseSchedule:
    angle = torch.linspace(0, 1.5, STEPS, device=device)
    return NoiseSchedule(angle.cos(), angle.sin())


def explicit(keys: NoiseKeys, channels: int, grid_size: int) -> ExplicitNoise:
    return reference.draw(keys, num_timesteps=STEPS, latent_channels=channels, grid_size=grid_size)


def assert_rounded(got: Tensor, exact: Tensor) -> None:
    """`got` is `exact` (float32) up to one rounding to its dtype and float32 noise; no NaN was left."""
    relative = torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(got.float(), exact, rtol=relative, atol=2e-5)


@pytest.mark.parametrize("given", [False, True], ids=["keys", "explicit"])
@pytest.mark.parametrize(("n", "num_draws", "channels", "grid_size", "dtype", "out_dtype"), CASES)
def test_kernels_equal_the_definition(
    device: str, given: bool, n: int, num_draws: int, channels: int, grid_size: int, dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> None:  # fmt: skip
    mean, logvar = moments(n, channels, grid_size, dtype, device)
    keys = keys_of(n, num_draws, device)
    noise: Noise = explicit(keys, channels, grid_size) if given else keys
    settings = {"shift": SHIFT, "scaling": SCALING}
    exact, t = noise_mse.noise_latents(mean, logvar, noise, schedule(device), **settings, use_triton=False)
    got, t_got = noise_mse.noise_latents(
        mean, logvar, noise, schedule(device), **settings, dtype=out_dtype, use_triton=True
    )
    assert got.dtype == out_dtype
    assert got.shape == (num_draws, n, grid_size**2, 4 * channels)
    assert torch.equal(t_got, t)
    assert_rounded(got, exact)

    predicted = (exact + 0.5).to(out_dtype)
    weight = torch.rand(num_draws, n, device=device)
    results = []
    for use_triton in (False, True):
        leaf = predicted.clone().requires_grad_()
        sums, counts = noise_mse.noise_mse(leaf, noise, use_triton=use_triton)
        (sums * weight).sum().backward()
        results.append((sums.detach(), counts, leaf.grad))
    (sums, counts, gradient), (sums_got, counts_got, gradient_got) = results
    assert counts_got.tolist() == counts.tolist() == [[grid_size**2 * 4 * channels] * n] * num_draws
    torch.testing.assert_close(sums_got, sums, rtol=1e-5, atol=1e-5)
    assert gradient_got.dtype == out_dtype
    target = reference.to_tokens(explicit(keys, channels, grid_size).eps)
    assert_rounded(gradient_got, 2 * (predicted.float() - target) * weight[..., None, None])
    torch.testing.assert_close(gradient_got, gradient, rtol=2 * torch.finfo(out_dtype).eps, atol=2e-5)


def test_definition_by_loops(device: str) -> None:
    """The definition itself, spelled out for one image with indices."""
    if device == "cuda":
        pytest.skip("nothing here runs on a GPU")
    channels, grid_size = 2, 3
    mean, logvar = moments(1, channels, grid_size, torch.float32, device)
    noise = explicit(keys_of(1, 2, device), channels, grid_size)
    table = schedule(device)
    x_t, t = noise_mse.noise_latents(mean, logvar, noise, table, shift=SHIFT, scaling=SCALING, use_triton=False)
    for k in range(2):
        for c, row, column in torch.cartesian_prod(torch.arange(channels), torch.arange(6), torch.arange(6)).tolist():
            std = torch.exp(0.5 * logvar[0, c, row, column])
            z = (mean[0, c, row, column] + std * noise.posterior[0, c, row, column] - SHIFT) * SCALING
            grouped, i, j = c * 4 + row % 2 * 2 + column % 2, row // 2, column // 2
            eps = noise.eps[k, 0, grouped, i, j]
            expected = table.signal[t[k, 0]] * z + table.noise[t[k, 0]] * eps
            torch.testing.assert_close(x_t[k, 0, i * grid_size + j, grouped], expected, rtol=1e-6, atol=1e-6)


def test_block_size_does_not_matter(device: str) -> None:
    """To the bit but for the order of summation; a GPU's compiler may fuse products and sums differently, too."""
    from ross_kernels.noise_mse import triton_impl

    mean, logvar = moments(2, 3, 5, torch.float32, device)
    keys = keys_of(2, 2, device)
    noised, sums, gradients = [], [], []
    for block in (1, 2, 8):
        noised.append(triton_impl.noise_latents(
            mean, logvar, keys, schedule(device), shift=SHIFT, scaling=SCALING, dtype=torch.float32, block=block
        )[0])  # fmt: skip
        sums.append(triton_impl.mse_sums(noised[0], keys, block=block))
        gradients.append(triton_impl.mse_backward(torch.ones(2, 2, device=device), noised[0], keys, block=block))
    tolerance = 0.0 if device == "cpu" else 2e-6
    for first, second in [*pairwise(noised), *pairwise(gradients)]:
        torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)
    for first, second in pairwise(sums):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


def test_an_image_does_not_depend_on_its_batch(device: str) -> None:
    mean, logvar = moments(3, 2, 3, torch.float32, device)
    keys = keys_of(3, 2, device)
    settings = {"shift": SHIFT, "scaling": SCALING, "use_triton": True}
    together, t = noise_mse.noise_latents(mean, logvar, keys, schedule(device), **settings)
    sums, _ = noise_mse.noise_mse(together, keys, use_triton=True)
    order = torch.tensor([2, 0], device=device)
    shuffled = replace(keys, keys=keys.keys[order])
    apart, t_apart = noise_mse.noise_latents(mean[order], logvar[order], shuffled, schedule(device), **settings)
    assert torch.equal(apart, together[:, order])
    assert torch.equal(t_apart, t[:, order])
    assert torch.equal(noise_mse.noise_mse(apart, shuffled, use_triton=True)[0], sums[:, order])


@pytest.mark.parametrize(
    ("n", "num_draws", "channels", "grid_size"),
    [
        pytest.param(3, 2, 2, 3, id="small"),
        pytest.param(8, 4, 16, 27, id="a microbatch", marks=pytest.mark.gpu),
        pytest.param(11600, 4, 16, 27, id="more elements than 32 bits count", marks=pytest.mark.gpu),
    ],
)
def test_the_last_image_of_many_is_that_image_alone(
    device: str, n: int, num_draws: int, channels: int, grid_size: int
) -> None:
    """Offsets of rows that wrapped around would read or write elsewhere."""
    if n > 3 and device == "cpu":
        pytest.skip("too much for the interpreter")
    image = moments(1, channels, grid_size, torch.float16, device)
    mean, logvar = (x.expand(n, -1, -1, -1).contiguous() for x in image)
    keys = keys_of(n, num_draws, device)
    last = replace(keys, keys=keys.keys[-1:])
    settings = {"shift": SHIFT, "scaling": SCALING, "dtype": torch.bfloat16, "use_triton": True}
    many, t = noise_mse.noise_latents(mean, logvar, keys, schedule(device), **settings)
    alone, t_alone = noise_mse.noise_latents(mean[-1:], logvar[-1:], last, schedule(device), **settings)
    assert torch.equal(many[:, -1:], alone)
    assert torch.equal(t[:, -1:], t_alone)
    leaf, leaf_alone = many.requires_grad_(), alone.requires_grad_()
    sums, _ = noise_mse.noise_mse(leaf, keys, use_triton=True)
    sums_alone, _ = noise_mse.noise_mse(leaf_alone, last, use_triton=True)
    assert torch.equal(sums[:, -1:], sums_alone)
    sums.sum().backward()
    sums_alone.sum().backward()
    assert torch.equal(leaf.grad[:, -1:], leaf_alone.grad)


def numbers_in_kernel(keys: NoiseKeys, channels: int, grid_size: int, device: str) -> tuple[Tensor, Tensor]:
    """eps [K, n, numel] and posterior noise [n, numel], seen through a schedule that passes one of them only."""
    n = keys.shape[1]
    mean = torch.zeros(n, channels, 2 * grid_size, 2 * grid_size, device=device)
    one, zero = torch.ones(STEPS, device=device), torch.zeros(STEPS, device=device)
    settings = {"shift": 0.0, "scaling": 1.0, "use_triton": True}
    eps, _ = noise_mse.noise_latents(mean, mean, keys, NoiseSchedule(zero, one), **settings)
    z, _ = noise_mse.noise_latents(mean, mean, replace(keys, num_draws=1), NoiseSchedule(one, zero), **settings)
    return eps.flatten(2), z[0].flatten(1)


def assert_standard_normal(numbers: Tensor) -> None:
    """Mean, variance, skewness and kurtosis within five standard errors."""
    count, x = numbers.numel(), numbers.double().flatten()
    assert abs(float(x.mean())) < 5 * (1 / count) ** 0.5
    assert abs(float(x.var()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float((x**3).mean())) < 5 * (15 / count) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 5 * (96 / count) ** 0.5


def test_moments_of_the_generated_noise(device: str) -> None:
    eps, posterior = numbers_in_kernel(keys_of(2, 2, device), 16, 9, device)
    assert_standard_normal(eps)
    assert_standard_normal(posterior)


def test_every_part_of_the_key_gives_other_numbers(device: str) -> None:
    """Rows that differ in seed, epoch, sample, image or draw, posterior included: uncorrelated, also in magnitude."""
    channels, grid_size = 4, 9
    rows = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.int64, device=device)
    eps, posterior = numbers_in_kernel(NoiseKeys(1, rows, 2), channels, grid_size, device)
    other_seed = [
        x.flatten(0, -2) for seed in (2, 2**32 + 1)
        for x in numbers_in_kernel(NoiseKeys(seed, rows[:1], 1), channels, grid_size, device)
    ]  # fmt: skip
    streams = torch.cat([eps.flatten(0, 1), posterior, *other_seed]).double()
    limit = 5 / streams.shape[1] ** 0.5
    for values in (streams, streams.abs()):
        correlation = torch.corrcoef(values).fill_diagonal_(0)
        assert correlation.abs().max() < limit


GOOD_KEYS = NoiseKeys(0, torch.zeros(2, 3, dtype=torch.int64), 2)
GOOD_NOISE = ExplicitNoise(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, 8, 3, 3), torch.zeros(2, 2, 6, 6))
GOOD = {
    "mean": torch.zeros(2, 2, 6, 6),
    "logvar": torch.zeros(2, 2, 6, 6),
    "noise": GOOD_KEYS,
    "schedule": NoiseSchedule(torch.ones(5), torch.ones(5)),
    "dtype": torch.float32,
}


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(2, 2, 6, 5)}, r"mean has shape \[2, 2, 6, 5\]"),
        ({"mean": torch.zeros(2, 2, 5, 5)}, "2g"),
        ({"mean": torch.zeros(2, 0, 6, 6)}, "above zero"),
        ({"logvar": torch.zeros(2, 2, 4, 4)}, "logvar has shape"),
        ({"mean": torch.zeros(2, 2, 6, 6, dtype=torch.int64)}, "mean is int64"),
        ({"logvar": torch.zeros(2, 2, 6, 6).half()}, "logvar is float16, but must be float32"),
        ({"noise": replace(GOOD_KEYS, keys=torch.zeros(3, 3, dtype=torch.int64))}, r"noise.keys has shape \[3, 3\]"),
        ({"noise": replace(GOOD_KEYS, keys=torch.zeros(2, 3))}, "noise.keys is float32, but must be int64"),
        ({"noise": replace(GOOD_KEYS, num_draws=0)}, "K = 0"),
        ({"noise": replace(GOOD_NOISE, eps=torch.zeros(2, 2, 9, 8))}, "noise.eps has shape"),
        ({"noise": replace(GOOD_NOISE, posterior=torch.zeros(2, 2, 6, 6).double())}, "noise.posterior is float64"),
        ({"noise": replace(GOOD_NOISE, t=torch.zeros(2, 2))}, "noise.t is float32"),
        ({"schedule": NoiseSchedule(torch.ones(5).double(), torch.ones(5))}, "schedule.signal is float64"),
        ({"schedule": NoiseSchedule(torch.ones(5), torch.ones(4))}, "schedule.noise has shape"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"logvar": torch.zeros(2, 2, 6, 6, device="meta")}, "logvar is on meta but mean is on cpu"),
        ({"noise": replace(GOOD_KEYS, keys=torch.zeros(2, 3, dtype=torch.int64, device="meta"))}, "on meta"),
    ],
)
def test_bad_noising_is_refused(use_triton: bool, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_mse.noise_latents(**{**GOOD, **change}, shift=0.0, scaling=1.0, use_triton=use_triton)


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize(
    ("predicted", "noise", "message"),
    [
        (torch.zeros(2, 9, 8), GOOD_KEYS, r"\[K, n, N, C4\]"),
        (torch.zeros(2, 2, 9, 8, dtype=torch.float64), GOOD_KEYS, "float64"),
        (torch.zeros(2, 2, 8, 8), GOOD_KEYS, "8 tokens"),
        (torch.zeros(2, 2, 9, 7), GOOD_KEYS, "7 channels"),
        (torch.zeros(3, 2, 9, 8), GOOD_KEYS, "K = 2 draws per image, but must have 3"),
        (torch.zeros(2, 1, 9, 8), GOOD_KEYS, "noise.keys has shape"),
        (torch.zeros(2, 2, 4, 8), GOOD_NOISE, "noise.eps has shape"),
        (torch.zeros(2, 2, 9, 8, device="meta"), GOOD_KEYS, "noise.keys is on cpu but predicted is on meta"),
    ],
)
def test_bad_scoring_is_refused(use_triton: bool, predicted: Tensor, noise: Noise, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_mse.noise_mse(predicted, noise, use_triton=use_triton)


def test_compiled_kernels_refuse_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from ross_kernels.noise_mse import triton_impl

    monkeypatch.setattr(triton_impl, "INTERPRETED", False)
    with pytest.raises(ValueError, match="run on CUDA tensors, but these are on cpu; pass use_triton=False"):
        noise_mse.noise_mse(torch.zeros(2, 2, 9, 8), GOOD_KEYS, use_triton=True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        noise_mse.noise_latents(**GOOD, shift=0.0, scaling=1.0, use_triton=True)


def test_compiled_kernels_refuse_tensors_of_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, where another one's memory is an error that ends the process."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    elsewhere = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    with pytest.raises(ValueError, match=r"current device, cuda:0, but these tensors are on cuda:1; .*set_device\(1\)"):
        require_runnable(elsewhere, interpreted=False)
    require_runnable(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0)), interpreted=False)
    require_runnable(elsewhere, interpreted=True)
