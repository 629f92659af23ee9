"""Settings arrive in Megatron's own configurations under Megatron's own names."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ross.config.layout import parse_layout
from megatron_ross.config.schema import RunConfig
from megatron_ross.models.language import transformer_config
from tests.helpers.golden import model_config


def made(
    text: str = "VEt*4NDH", pp: int = 1, attention: str = "local", engine: bool = False, **flat: Any
) -> TransformerConfig:
    run = RunConfig.from_flat({"pipeline_model_parallel_size": pp, **flat})
    layout = parse_layout(text, num_layers=4, pipeline_model_parallel_size=pp, has_denoiser=True)
    return transformer_config(
        model_config("qwen2_siglip").language,
        run.parallel,
        run.compute,
        layout,
        transformer_engine=engine,
        attention_backend=attention,
    )


# Each value differs from Megatron's default.
SAME_NAME: list[dict[str, Any]] = [
    {"fp8": "hybrid", "bf16": True},
    {"fp8": "e4m3", "bf16": True},
    *({"fp8": "hybrid", "fp8_recipe": recipe} for recipe in ("tensorwise", "blockwise", "mxfp8")),
    {
        "fp8": "hybrid",
        "fp8_margin": 1,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "fp8_wgrad": False,
    },
    {
        "fp8": "hybrid",
        "fp8_recipe": "blockwise",
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 2,
        "num_layers_at_end_in_bf16": 0,
    },
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    {"gradient_accumulation_fusion": True},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True, "tp_comm_overlap": True, "bf16": True},
]


@pytest.mark.parametrize("flat", SAME_NAME, ids=str)
def test_fields_have_the_settings_values(flat: dict[str, Any]) -> None:
    default, config = made(), made(**flat)
    for name, value in flat.items():
        assert getattr(config, name) == value, name
        if name != "fp8_recipe" or value != "delayed":
            assert getattr(default, name) != value, f"{name}: the test would not see that it is not passed on"


def test_defaults_leave_everything_off() -> None:
    config = made()
    assert (config.fp8, config.recompute_granularity) == (None, None)
    assert (config.tp_comm_overlap, config.gradient_accumulation_fusion) == (False, False)


@pytest.mark.parametrize("backend", ["auto", "flash", "fused", "unfused", "local"])
def test_attention_backend(backend: str) -> None:
    assert made(attention=backend).attention_backend is AttnBackend[backend]


@pytest.mark.parametrize("packed", [False, True])
def test_transformer_engines_layers_have_its_rotary_kernel(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron goes to the kernel of padded or of packed samples; the local layers never do."""
    taken = []
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        kernel = functools.partial(lambda name, t, *args, **kwargs: taken.append(name) or t, name)
        monkeypatch.setattr(rope_utils, name, kernel)
    states, angles = torch.ones(6, 2, 8), torch.ones(6, 1, 1, 8)
    states, bounds = (states, torch.tensor([0, 4, 6])) if packed else (states[:, None], None)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    for engine in (True, False):
        rope_utils.apply_rotary_pos_emb(states, angles, made(engine=engine), bounds, cp_group=alone)
    assert taken == ["fused_apply_rotary_pos_emb_thd" if packed else "fused_apply_rotary_pos_emb"]


def test_sends_overlap_when_the_schedule_is_interleaved() -> None:
    plain, interleaved = made("VEt*2|t*2NDH", 2), made("VEt|t|t|tNDH", 2)
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm, plain.deallocate_pipeline_outputs) == (False, True, True)
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)
    assert not interleaved.deallocate_pipeline_outputs


def test_a_dtype_for_all_that_the_decoder_sends() -> None:
    assert made(bf16=True).pipeline_dtype is torch.bfloat16
    assert made().params_dtype is torch.float32
