"""Rules between data settings: one line each, before any process group exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import check_anything_is_trained, validate_run
from megatron_ross.convert.known_models import known_model

PACKED = {"packing": True, "sequence_parallel": True, "tensor_model_parallel_size": 4}


def check(folder: Path, **settings: Any) -> None:
    (folder / "a.json").touch()
    flat = {"data_path": str(folder / "a.json"), "init_from": "x", "global_batch_size": 8}
    validate_run(RunConfig.from_flat(flat | settings), world_size=4)


@pytest.mark.parametrize("change", [{"seq_length": 2048}, {"sequence_parallel": False}, {"packing": False}])
def test_packs_that_can_be_split_are_accepted(tmp_path: Path, change: dict[str, Any]) -> None:
    check(tmp_path, **PACKED | {"seq_length": 2046} | change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            PACKED | {"seq_length": 2046},
            "seq_length=2046: packs of this length are split over tensor_model_parallel_size=4 ranks by "
            "sequence_parallel, so it must be a multiple; use 2044 or 2048",
        ),
        ({"packing_lookahead": 0}, "packing_lookahead=0: must be at least 1"),
        ({"num_workers": 0}, "num_workers=0: must be at least 1"),
        ({"num_prefetch_steps": -1}, "num_prefetch_steps=-1: must not be negative"),
        ({"max_bad_sample_share": 1.5}, "max_bad_sample_share=1.5: must be a share of the samples, from 0 to 1"),
        (
            {"lm_loss_weight": 0, "recon_loss_weight": 0},
            "lm_loss_weight=0, recon_loss_weight=0: nothing would be trained; give one of them a weight",
        ),
        ({"lm_loss_weight": -1}, "lm_loss_weight=-1: must not be negative"),
        ({"max_empty_steps": 0}, "max_empty_steps=0: must be at least 1"),
        ({"max_mismatch_share": -0.1}, "max_mismatch_share=-0.1: must be a share of the samples, from 0 to 1"),
    ],
)
def test_every_mistake_is_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, **settings)
    assert str(caught.value) == message


FROZEN = {"freeze_language_model": True, "freeze_mm_mlp_adapter": True}


@pytest.mark.parametrize(
    ("settings", "has_denoiser", "message"),
    [
        ({}, True, ""),
        (FROZEN, True, ""),
        (FROZEN, False, "no part is left"),
        (FROZEN | {"recon_loss_weight": 0}, True, "no part is left"),
        (FROZEN | {"freeze_mm_inv_projector": True}, True, "no part is left"),
        (FROZEN | {"freeze_mm_inv_projector": True, "unfreeze_mm_vision_tower": True}, True, ""),
        ({"lm_loss_weight": 0}, True, ""),
        ({"lm_loss_weight": 0}, False, "lm_loss_weight=0: the model has no denoiser"),
    ],
)
def test_some_part_is_trained(settings: dict[str, Any], has_denoiser: bool, message: str) -> None:
    model, run = known_model("qwen2-0.5b+clip-l-336", reconstructs=has_denoiser), RunConfig.from_flat(settings)
    if not message:
        check_anything_is_trained(run, model)
        return
    with pytest.raises(ConfigError, match=message):
        check_anything_is_trained(run, model)
