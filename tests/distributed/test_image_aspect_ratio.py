"""A run with `image_aspect_ratio: square` on a checkpoint of `pad`: losses, cached latents, checkpoints, exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.config.schema import RunConfig
from megatron_ross.convert.cli import export_checkpoint
from megatron_ross.training.latents import CachingOptions, cache_data_set, check_latent_cache
from megatron_ross.training.start import start_of
from tests.helpers.distributed import run_ranks
from tests.helpers.toy_run import curve, two_stage_settings

SQUARE, PAD = {"image_aspect_ratio": "square"}, {"image_aspect_ratio": "pad"}
STAGE_1 = {"freeze_language_model": True, "save_trainable_only": True, "train_iters": 1}
CACHING = CachingOptions(show_progress=False)
RECON = 2e-5  # what float16 moments round off


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return two_stage_settings(tmp_path_factory.mktemp("toy"))


def check(flat: dict[str, Any]) -> None:
    run = RunConfig.from_flat(flat)
    check_latent_cache(run, start_of(run).directory)


def mode_of(folder: Path) -> str:
    return Manifest.read(resolve_checkpoint(folder / "checkpoints")).model.vision.image_aspect_ratio


@pytest.mark.distributed
def test_checkpoints_and_exports_follow_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """Stage 1 on `square`, stage 2 on `pad`, as the recipes do; a run that asks for nothing goes on as before."""
    stage_1, again, stage_2 = (tmp_path / name for name in ("stage_1", "again", "stage_2"))
    flat = settings | STAGE_1 | SQUARE | {"save": str(stage_1)}
    square = run_ranks(curve, 2, flat, 1, save=True)[0]["losses"][0]
    assert mode_of(stage_1) == "square"
    assert open_checkpoint(stage_1 / "checkpoints").manifest.base is not None  # opens although its base has `pad`
    padded = run_ranks(curve, 2, settings | STAGE_1 | PAD, 1)[0]["losses"][0]
    assert padded == run_ranks(curve, 2, settings | STAGE_1, 1)[0]["losses"][0]
    assert abs(square[1] - padded[1]) > 1e-5
    resumed = settings | STAGE_1 | {"train_iters": 2, "init_from": "", "load": str(stage_1), "save": str(again)}
    resumed |= {"lr_continue": "schedule"}
    run_ranks(curve, 2, resumed, 1, save=True)
    assert mode_of(again) == "square"
    export_checkpoint(stage_1 / "checkpoints", tmp_path / "hf", "ross")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["image_aspect_ratio"] == "square"
    run_ranks(curve, 2, settings | PAD | {"init_from": str(stage_1), "save": str(stage_2)}, 1, save=True)
    assert mode_of(stage_2) == "pad"


@pytest.mark.distributed
def test_cached_latents_are_those_of_the_runs_images(settings: dict[str, Any], tmp_path: Path) -> None:
    cache = {"latent_cache": str(tmp_path / "cache")}
    cache_data_set(RunConfig.from_flat(settings | SQUARE), tmp_path / "cache", CACHING)
    check(settings | SQUARE | cache)
    with pytest.raises(ValueError, match=r"other images \(image_aspect_ratio\): square, this model has pad"):
        check(settings | cache)
    with pytest.raises(ValueError, match=r"other images \(image_aspect_ratio\).*give another folder"):
        cache_data_set(RunConfig.from_flat(settings | PAD), tmp_path / "cache", CACHING)
    online = run_ranks(curve, 2, settings | SQUARE, 1)[0]["losses"][0]
    cached = run_ranks(curve, 2, settings | SQUARE | cache, 1)[0]["losses"][0]
    assert cached[:2] == pytest.approx(online[:2], rel=RECON)
