"""Runs on one GPU: the recorded numbers of the published code, and a run that is saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_parity_golden import QUICK, compare_with_recorded
from tests.helpers import golden
from tests.helpers.distributed import run_ranks
from tests.helpers.toy_run import curve, two_stage_settings

pytestmark = pytest.mark.gpu

ONE_GPU = {"pipeline_model_parallel_size": 1, "layout": "VEt*4NDH"}
SAVED_AT, STEPS = 2, 4


@pytest.mark.parametrize("model", golden.MODELS)
def test_recorded_numbers(model: str) -> None:
    """In fp32 with Triton's kernels. TransformerEngine's layers multiply fp32 matrices in TF32, so they stay out."""
    flat = {"layout": "VEt*4NDH", "transformer_impl": "local", "denoiser_dtype": "fp32"}
    rows = run_ranks(compare_with_recorded, 1, model, flat, QUICK, backend="nccl")[0]
    assert [text for _, ok, text in rows if not ok] == []
    assert len(rows) >= 600


@pytest.mark.parametrize("flat", [{"freeze_language_model": True}, {}], ids=["stage 1", "stage 2"])
def test_a_resumed_run_goes_on(flat: dict[str, Any], tmp_path: Path) -> None:
    """In bf16 with whatever layers, kernels and optimizer this machine has; saved while training goes on."""
    settings = two_stage_settings(tmp_path) | ONE_GPU | {"bf16": True, "async_save": True} | flat
    (whole,) = run_ranks(curve, 1, settings, STEPS, backend="nccl")
    folder = str(tmp_path / "run")
    run_ranks(curve, 1, settings | {"save": folder}, SAVED_AT, save=True, backend="nccl")
    resume = settings | {"load": folder, "init_from": ""}
    (got,) = run_ranks(curve, 1, resume, STEPS - SAVED_AT, backend="nccl")
    assert got["digest"] == whole["digest"]
    assert got["iteration"] == STEPS
    for ours, expected in zip(got["losses"], whole["losses"][SAVED_AT:], strict=True):
        assert ours == pytest.approx(expected, rel=1e-3)
