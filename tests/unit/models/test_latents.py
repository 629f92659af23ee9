"""VAE input, posterior, diffusion target and decoding against recorded values; grouping order; empty input."""

from __future__ import annotations

import pytest
import torch

from megatron_ross.models.latents import LatentEncoder, group_latents, ungroup_latents
from tests.helpers import golden


def load(model: str) -> LatentEncoder:
    config = golden.model_config(model)
    encoder = LatentEncoder(config.vae, config.vision)
    encoder.vae.load_state_dict(golden.part(model, "vae"))
    return encoder


@pytest.mark.parametrize("model", golden.MODELS)
@pytest.mark.parametrize("letter", ["a", "b"])
def test_target_equals_golden(model: str, letter: str) -> None:
    data = golden.case(model, letter)
    encoder = load(model)
    limit = golden.tolerance("vae_latents_max_over_maxabs")
    if "out.images_vae" in data:
        golden.assert_close(encoder.vae_input(data["in.images"]), data["out.images_vae"], 1e-6)
    mean, logvar = encoder.posterior(data["in.images"])
    golden.assert_close(mean, data["out.vae_mean"], limit)
    golden.assert_close(logvar, data["out.vae_logvar"], limit)
    golden.assert_close(encoder(data["in.images"], data["draw.vae_noise"]), data["out.z_q"], limit)


@pytest.mark.parametrize("model", golden.MODELS)
def test_decoded_images_equal_golden(model: str) -> None:
    run = golden.tensors(f"{model}/sampling.safetensors")
    encoder = load(model)
    limit = golden.tolerance("sampling_max_over_maxabs")
    golden.assert_close(encoder.decode_latents(run["steps_6_6_1.z_0"]), run["steps_6_6_1.decoded"], limit)
    clean = golden.case(model, "a")["out.z_q"]
    golden.assert_close(encoder.decode_latents(clean), run["target.decoded"], limit)


def test_grouping_order() -> None:
    """Output channel c*4 + row*2 + column, checked against the definition."""
    z = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    grouped = group_latents(z)
    for c in range(3):
        for row in range(2):
            for column in range(2):
                assert torch.equal(grouped[:, c * 4 + row * 2 + column], z[:, c, row::2, column::2])
    assert torch.equal(ungroup_latents(grouped), z)


def test_no_images() -> None:
    out = load("qwen2_siglip")(torch.zeros(0, 3, 56, 56), torch.zeros(0, 16, 8, 8))
    assert out.shape == (0, 64, 4, 4)


def test_is_frozen() -> None:
    encoder = load("qwen2_siglip")
    assert not any(p.requires_grad for p in encoder.parameters())
    data = golden.case("qwen2_siglip", "a")
    assert not encoder(data["in.images"].clone().requires_grad_(), data["draw.vae_noise"]).requires_grad
