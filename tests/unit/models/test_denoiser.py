"""Denoiser against recorded outputs, losses, gradients, sampling runs; names, initialisation, dtypes, empty input."""

from __future__ import annotations

import pytest
import torch

from megatron_ross.config.model import DenoiserConfig
from megatron_ross.models import diffusion
from megatron_ross.models.denoiser import RossDenoiser, normalize_condition, position_table
from tests.helpers import golden


def load(model: str, compute_dtype: torch.dtype = torch.float32) -> RossDenoiser:
    config = golden.model_config(model)
    denoiser = RossDenoiser(
        config.denoiser,
        in_channels=4 * config.vae.latent_channels,
        hidden_size=config.language.hidden_size,
        grid_size=config.vision.grid_size,
        compute_dtype=compute_dtype,
    )
    denoiser.load_state_dict(golden.part(model, "denoiser"))
    return denoiser


def small(seed: int = 0) -> RossDenoiser:
    denoiser = RossDenoiser(DenoiserConfig(depth=2, width=32, num_heads=4), in_channels=8, hidden_size=24, grid_size=3)
    denoiser.init_weights(torch.Generator().manual_seed(seed))
    return denoiser


@pytest.mark.parametrize("model", golden.MODELS)
@pytest.mark.parametrize("letter", ["a", "b"])
def test_prediction_and_loss_equal_golden(model: str, letter: str) -> None:
    data = golden.case(model, letter)
    n = data["out.z_q"].shape[0]
    x_t, t = data["out.x_t"].unflatten(0, (4, n)), data["draw.t"].view(4, n)
    prediction = load(model)(x_t, t, golden.image_token_states(model, letter))
    golden.assert_close(
        prediction.flatten(0, 1), data["out.model_output"], golden.tolerance("denoiser_output_max_over_maxabs")
    )
    each = (prediction - data["draw.eps"].view_as(prediction)).square().flatten(2).mean(-1)
    torch.testing.assert_close(each, data["out.vm_loss_each"], rtol=golden.tolerance("losses_relative"), atol=0)


@pytest.mark.parametrize("model", golden.MODELS)
def test_normalized_condition_equals_golden(model: str) -> None:
    context = golden.case(model, "a")["out.context"]
    condition = normalize_condition(golden.image_token_states(model, "a"))
    golden.assert_close(condition.transpose(1, 2).reshape(context.shape), context, 1e-5)


@pytest.mark.parametrize("model", golden.MODELS)
def test_gradients_equal_golden(model: str) -> None:
    """The stage-2 file of one model is complete; k biases have zero gradient in exact arithmetic and are skipped."""
    data = golden.case(model, "a")
    denoiser = load(model)
    prediction = denoiser(
        data["out.x_t"].unflatten(0, (4, 2)), data["draw.t"].view(4, 2), golden.image_token_states(model, "a")
    )
    (prediction - data["draw.eps"].view_as(prediction)).square().mean().backward()
    expected = golden.tensors(f"{model}/case_a_grads_stage2.safetensors")
    compared = 0
    for name, parameter in denoiser.named_parameters():
        key = "model.mm_inv_projector.net." + name
        if key in expected and not name.endswith("qkv.bias"):
            golden.assert_close(parameter.grad, expected[key], golden.tolerance("gradients_max_over_maxabs"))
            compared += 1
    assert compared >= (30 if model == "qwen2_siglip" else 1)


@pytest.mark.parametrize(
    ("model", "respacing"),
    [("qwen2_siglip", "10"), ("qwen2_siglip", "6,6,1"), ("llama_clip", "6,6,1"), ("qwen2_siglip", "1000")],
)
def test_sampling_run_equals_golden(model: str, respacing: str) -> None:
    run = golden.tensors(f"{model}/sampling.safetensors")
    key = "steps_" + respacing.replace(",", "_")
    denoiser = load(model)
    with torch.no_grad():
        condition = denoiser.z_embedder(run["in.context"].flatten(2).transpose(1, 2))
    seen: list[int] = []

    def eps_model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(int(t[0]))
        return denoiser.predict_noise(x, t, condition)

    tables = diffusion.respace(diffusion.cosine_tables(), respacing)
    states = list(diffusion.sample_steps(eps_model, run["in.x_T"], lambda k: run["in.noise_bank"][k % 16], tables))
    limit = golden.tolerance("sampling_max_over_maxabs")
    assert seen == run[f"{key}.t_model"].tolist()
    golden.assert_close(states[-1], run[f"{key}.z_0"], limit)
    if f"{key}.samples" in run:
        golden.assert_close(torch.stack(states), run[f"{key}.samples"], limit)


@pytest.mark.parametrize("model", golden.MODELS)
def test_position_table_equals_stored_one(model: str) -> None:
    stored = golden.part(model, "denoiser")["pos_embed"]
    torch.testing.assert_close(position_table(stored.shape[-1], 4), stored, rtol=0, atol=1e-6)


def test_draws_share_the_condition_embedding() -> None:
    denoiser = small()
    rows: list[tuple[int, ...]] = []
    denoiser.z_embedder[1].register_forward_hook(lambda module, args, out: rows.append(tuple(out.shape)))
    denoiser(torch.randn(5, 2, 8, 3, 3), torch.randint(0, 1000, (5, 2)), torch.randn(2, 9, 24))
    assert rows == [(2, 9, 32)]


def test_draws_and_images_are_independent() -> None:
    """Row (k, i) must depend on its own latent, timestep and image only: compute every row on its own and compare."""
    denoiser = small()
    g = torch.Generator().manual_seed(3)
    for parameter in denoiser.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    x_t, t = torch.randn(3, 2, 8, 3, 3, generator=g), torch.randint(0, 1000, (3, 2), generator=g)
    condition = torch.randn(2, 9, 24, generator=g)
    together = denoiser(x_t, t, condition)
    for k in range(3):
        for i in range(2):
            alone = denoiser(x_t[k : k + 1, i : i + 1], t[k : k + 1, i : i + 1], condition[i : i + 1])
            torch.testing.assert_close(together[k, i], alone[0, 0], rtol=1e-5, atol=1e-5)


def test_no_images_give_empty_output_and_zero_gradients() -> None:
    denoiser = small()
    out = denoiser(torch.zeros(4, 0, 8, 3, 3), torch.zeros(4, 0, dtype=torch.int64), torch.zeros(0, 9, 24))
    assert out.shape == (4, 0, 8, 3, 3)
    out.sum().backward()
    for name, parameter in denoiser.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_stored_dtype_does_not_change_the_arithmetic() -> None:
    """bf16 parameters computed in fp32 equal their fp32 copies exactly."""
    data = golden.case("qwen2_siglip", "a")
    inputs = (
        data["out.x_t"].unflatten(0, (4, 2)),
        data["draw.t"].view(4, 2),
        golden.image_token_states("qwen2_siglip", "a"),
    )
    stored_bf16 = load("qwen2_siglip").bfloat16()
    rounded = load("qwen2_siglip").bfloat16().float()
    out = stored_bf16(*inputs)
    assert out.dtype == torch.float32
    assert torch.equal(out, rounded(*inputs))
    low = load("qwen2_siglip", compute_dtype=torch.bfloat16)(*inputs)
    assert low.dtype == torch.bfloat16


def test_autocast_around_it_has_no_effect() -> None:
    denoiser = load("qwen2_siglip")
    data = golden.case("qwen2_siglip", "a")
    inputs = (data["out.x_t"].unflatten(0, (4, 2)), data["draw.t"].view(4, 2))
    condition = golden.image_token_states("qwen2_siglip", "a")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = denoiser(*inputs, condition)
    assert torch.equal(inside, denoiser(*inputs, condition))


def test_initialisation() -> None:
    denoiser = small(seed=7)
    twin = small(seed=7)
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), twin.parameters(), strict=True))
    out = denoiser(torch.randn(2, 1, 8, 3, 3), torch.tensor([[3], [900]]), torch.randn(1, 9, 24))
    assert not out.any(), "a fresh denoiser predicts zero"
    for name, parameter in denoiser.named_parameters():
        if name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert not parameter.any(), name
    bound = (6 / (32 + 96)) ** 0.5  # xavier-uniform of the qkv matrix [96, 32]
    qkv = denoiser.blocks[0].attn.qkv.weight
    assert 0.9 * bound < qkv.abs().max() <= bound
    for weight in (denoiser.t_embedder.mlp[0].weight, denoiser.t_embedder.mlp[2].weight, denoiser.z_embedder[1].weight):
        assert 0.015 < weight.std() < 0.025
    assert not denoiser.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DenoiserConfig(width=30, num_heads=3), "multiple of 4"),
        (DenoiserConfig(width=64, num_heads=5), "not divisible by its 5 heads"),
    ],
)
def test_impossible_widths_are_refused(config: DenoiserConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RossDenoiser(config, in_channels=8, hidden_size=24, grid_size=3)
