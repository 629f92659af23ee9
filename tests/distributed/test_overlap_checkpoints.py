"""A checkpoint of a run whose parameters are gathered late holds the updated ones, and resumes as without overlap."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ross.checkpoint.manifest import resolve_checkpoint
from megatron_ross.checkpoint.reader import MODEL_PREFIXES, open_checkpoint
from megatron_ross.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.toy_run import curve, with_trainer, write_data
from tests.helpers.variants import make_variant

STEPS, SAVED_AT = 4, 2
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 1}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        **write_data(tmp_path_factory.mktemp("data")),
        "init_from": str(make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip").path),
        "layout": "VEt*4NDH",
        "seq_length": 256,
        "global_batch_size": 8,
        "lr": 1e-3,
        "lr_warmup_fraction": 0.0,
        "train_iters": STEPS,
        "tensorboard": False,
    }


@pytest.mark.distributed
def test_saved_weights_and_resume(settings: dict[str, Any], tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("plain", "overlap")}
    for name, overlap in (("plain", {}), ("overlap", OVERLAP)):
        run_ranks(curve, 2, settings | overlap | {"save": str(folders[name])}, SAVED_AT, save=True)
    plain, overlap = (open_checkpoint(resolve_checkpoint(folder / "checkpoints")) for folder in folders.values())
    names = [key for key in plain.keys() if key.startswith(MODEL_PREFIXES)]  # noqa: SIM118
    assert names
    for name in names:
        torch.testing.assert_close(overlap.read(name), plain.read(name), rtol=1e-5, atol=1e-7, msg=name)
    whole = run_ranks(curve, 2, settings, STEPS)[0]
    resumed = run_ranks(
        curve, 2, settings | OVERLAP | {"load": str(folders["overlap"]), "init_from": ""}, STEPS - SAVED_AT
    )[0]
    for got, expected in zip(resumed["losses"], whole["losses"][SAVED_AT:], strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


def printed_at_start(rank: int, world_size: int, flat: dict[str, Any]) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        with_trainer(flat, Trainer._announce)
    return output.getvalue()


@pytest.mark.distributed
def test_one_rank_prints_the_table_of_features(settings: dict[str, Any]) -> None:
    texts = run_ranks(printed_at_start, 2, settings | OVERLAP)
    (text,) = [text for text in texts if text]
    lines = [line.split() for line in text.splitlines()]
    assert ["feature", "on/off", "why"] in lines
    assert ["parameter", "gather", "overlap", "on", "overlap_param_gather=True"] in lines
    assert ["packing", "off", "packing=False"] in lines
