"""Formulas against torch's own count of the operations that our modules execute.

The counter counts all (query, key) pairs of an attention, also those that a causal mask hides, so the comparison gives
it all pairs: what is under test is everything per pair. The number of causal pairs has its own test.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import LossConfig, RunConfig, TrainabilityConfig
from megatron_ross.models.denoiser import RossDenoiser
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.models.projector import build_projector
from megatron_ross.models.vision import VisionTower
from megatron_ross.planner.flops import (
    Flops,
    Trained,
    decoder_layer_flops,
    denoiser_flops,
    head_flops,
    module_flops,
    projector_flops,
    step_flops,
    tower_flops,
    vae_encoder_flops,
)
from megatron_ross.planner.hardware import GPUS
from megatron_ross.planner.search import plan_run
from megatron_ross.planner.timing import CostModel
from megatron_ross.planner.workload import Work, causal_pairs, default_workload
from tests.helpers.golden import MODELS, model_config

TOLERANCE = 0.02
STAGE_1 = Trained.of(TrainabilityConfig(freeze_language_model=True))
STAGE_2 = Trained.of(TrainabilityConfig())
WITH_TOWER = dataclasses.replace(STAGE_2, tower=True)
NOTHING_BEFORE = Trained(tower=False, projector=False, language=False, denoiser=True)


def counted(output_of, *inputs: Tensor) -> Flops:
    """Forward and backward operations of `output_of(*inputs)` as torch counts them."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = output_of(*inputs)
        if not output.requires_grad:
            return Flops(forward.get_total_flops(), 0)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())


def assert_agree(predicted: Flops, expected: Flops) -> None:
    assert expected.forward > 0
    assert predicted.forward == pytest.approx(expected.forward, rel=TOLERANCE)
    assert predicted.backward == pytest.approx(expected.backward, rel=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trained", [STAGE_2, WITH_TOWER])
def test_tower(name: str, trained: Trained) -> None:
    config = model_config(name).vision
    tower = VisionTower(config)
    tower.set_trainable(trained.tower)
    pixels = torch.randn(3, 3, config.image_size, config.image_size)
    assert_agree(tower_flops(config, 3, trained), counted(tower, pixels))


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
@pytest.mark.parametrize("trained", [STAGE_1, WITH_TOWER])
def test_projector(kind: str, trained: Trained) -> None:
    model = model_config("qwen2_siglip")
    model = dataclasses.replace(model, projector=dataclasses.replace(model.projector, type=kind))
    projector = build_projector(model.projector, model.vision.hidden_size, model.language.hidden_size)
    features = torch.randn(2, model.vision.num_image_tokens, model.vision.hidden_size, requires_grad=trained.tower)
    assert_agree(projector_flops(model, 2, trained), counted(projector, features))


def hf_decoder(model: RossModelConfig) -> nn.Module:
    language = model.language
    sizes = {
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_query_groups,
        "vocab_size": 8,
    }
    return Qwen2Model(Qwen2Config(**sizes)) if language.family == "qwen2" else LlamaModel(LlamaConfig(**sizes))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trained", [STAGE_1, STAGE_2])
def test_decoder(name: str, trained: Trained) -> None:
    model = model_config(name)
    decoder = hf_decoder(model).requires_grad_(trained.language)
    length, rows = 96, 2
    embeddings = torch.randn(rows, length, model.language.hidden_size, requires_grad=True)
    predicted = decoder_layer_flops(model.language, rows * length, rows * length**2, trained)
    measured = counted(lambda x: decoder(inputs_embeds=x, use_cache=False).last_hidden_state, embeddings)
    assert_agree(predicted * model.language.num_layers, measured)


@pytest.mark.parametrize("trained", [STAGE_1, STAGE_2])
def test_head(trained: Trained) -> None:
    language = model_config("qwen2_siglip").language
    head = nn.Linear(language.hidden_size, language.vocab_size, bias=False).requires_grad_(trained.language)
    assert_agree(
        head_flops(language, 37, trained), counted(head, torch.randn(37, language.hidden_size, requires_grad=True))
    )


@pytest.mark.parametrize("trained", [STAGE_2, NOTHING_BEFORE])
def test_denoiser(trained: Trained) -> None:
    model, images, draws = model_config("qwen2_siglip"), 2, 4
    assert model.denoiser is not None
    assert model.vae is not None
    grid, channels = model.vision.grid_size, 4 * model.vae.latent_channels
    denoiser = RossDenoiser(model.denoiser, channels, model.language.hidden_size, grid)
    condition = torch.randn(images, grid**2, model.language.hidden_size, requires_grad=trained.hidden)
    x_t, t = torch.randn(draws, images, channels, grid, grid), torch.randint(1000, (draws, images))
    assert_agree(
        denoiser_flops(model, images, draws, trained), counted(lambda c: denoiser(x_t, t, c).square(), condition)
    )


@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_vae_encoder(layers_per_block: int) -> None:
    model = model_config("qwen2_siglip")
    assert model.vae is not None
    hf = model.vae.hf_config | {"layers_per_block": layers_per_block, "block_out_channels": [8, 16, 24, 24]}
    config = dataclasses.replace(model.vae, hf_config=hf)
    encoder = LatentEncoder(config, model.vision)
    pixels = torch.randn(2, 3, model.vision.image_size, model.vision.image_size)
    measured = counted(lambda x: encoder.posterior(x)[0], pixels)
    assert_agree(vae_encoder_flops(config, model.decode_image_size, 2), measured)


def test_frozen_backward_is_not_counted() -> None:
    model, work = model_config("qwen2_siglip"), Work(100, 5050, 40, 1, 1)
    stage_1, stage_2 = (module_flops(model, trained, work, 4) for trained in (STAGE_1, STAGE_2))
    assert stage_1["tower"].backward == stage_1["vae"].backward == 0
    linear_forward = decoder_layer_flops(model.language, 100, 0, STAGE_2).forward * model.language.num_layers
    assert stage_2["decoder"].backward - stage_1["decoder"].backward == pytest.approx(linear_forward)
    frozen = TrainabilityConfig(freeze_language_model=True, freeze_mm_mlp_adapter=True)
    assert module_flops(model, Trained.of(frozen), work, 4)["decoder"].backward == 0


def test_step_flops_sum_the_modules_and_need_no_images() -> None:
    model, work = model_config("llama_clip"), Work(50, 1275, 10, 2, 2)
    parts = module_flops(model, STAGE_2, work, 4)
    assert step_flops(model, TrainabilityConfig(), work, 4) == sum(p.forward + p.backward for p in parts.values())
    text_only = module_flops(model, STAGE_2, dataclasses.replace(work, images=0, reconstructed_images=0), 4)
    assert {name for name, part in text_only.items() if part.total > 0} == {"decoder", "head"}


def test_causal_pairs_do_not_cross_samples() -> None:
    lengths = [3, 5]
    segment = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    allowed = (segment[:, None] == segment) & torch.ones(8, 8).tril().bool()
    assert causal_pairs(lengths) == int(allowed.sum())


def test_passes_of_the_denoiser_follow_the_objective_and_the_weight() -> None:
    """Regression passes once; without weight neither denoiser nor VAE runs."""
    assert LossConfig(num_noise_draws=4).denoiser_passes == 4
    assert LossConfig(num_noise_draws=4, recon_objective="regress").denoiser_passes == 1
    assert LossConfig(recon_loss_weight=0).denoiser_passes == 0
    assert LossConfig(recon_loss_weight=0, recon_objective="regress").denoiser_passes == 0
    model, work = model_config("llama_clip"), Work(50, 1275, 10, 2, 2)
    off = module_flops(model, STAGE_2, work, 0)
    assert off["denoiser"].total == off["vae"].total == 0


def test_without_a_language_loss_the_planner_counts_no_head() -> None:
    model = model_config("qwen2_siglip")
    with_head, without = (
        plan_run(RunConfig.from_flat({"lm_loss_weight": weight}), model, 1, GPUS["h100"]) for weight in (1, 0)
    )
    costs = [CostModel(model, plan.run, GPUS["h100"], default_workload(plan.run)) for plan in (with_head, without)]
    assert [cost.letters()["H"].total > 0 for cost in costs] == [True, False]
    assert costs[1].microbatch == dataclasses.replace(costs[0].microbatch, supervised_tokens=0)
    assert without.time.total < with_head.time.total
    assert without.peak_memory.activations < with_head.peak_memory.activations
    assert without.peak_memory.optimizer < with_head.peak_memory.optimizer
