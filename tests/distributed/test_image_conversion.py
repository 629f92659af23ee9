"""`image_conversion` of a run: kept by checkpoints and exports: a model is always shown what it was trained on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_ross.checkpoint.manifest import MANIFEST_NAME, Manifest, resolve_checkpoint
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.model_limits import check_model
from megatron_ross.config.schema import RunConfig
from megatron_ross.convert.cli import export_checkpoint
from megatron_ross.data.images import decode_image
from megatron_ross.evaluation.generate import load_for_inference, model_rgb, open_image
from megatron_ross.huggingface.chat_templates import chat_template
from megatron_ross.huggingface.processing_ross import RossProcessor
from megatron_ross.training.start import start_of, with_image_conversion
from tests.helpers.distributed import run_ranks
from tests.helpers.toy_run import curve, write_data
from tests.helpers.variants import make_variant

PUBLISHED, VIEWER = {"image_conversion": "published"}, {"image_conversion": "viewer"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every image is black writing on a transparent ground, which `published` shows as a black square."""
    folder = tmp_path_factory.mktemp("toy")
    data = write_data(folder / "data", 9)
    for number, path in enumerate(sorted(Path(data["image_folder"]).iterdir())):
        pixels = np.zeros((40, 52, 2), dtype=np.uint8)
        pixels[5 + number : 25, 10:30, 1] = 255
        Image.fromarray(pixels).save(path)
    return {
        **data,
        "init_from": str(make_variant(folder / "model", "qwen2_siglip").path),
        "layout": "VEt*4NDH",
        "seq_length": 256,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "lr": 1e-3,
        "tensorboard": False,
    }


def conversion_of(folder: Path) -> str:
    return Manifest.read(resolve_checkpoint(folder / "checkpoints")).model.vision.image_conversion


@pytest.mark.distributed
def test_runs_checkpoints_and_exports(settings: dict[str, Any], tmp_path: Path) -> None:
    runs = {}
    for name, flat in (("new", {}), ("viewer", VIEWER), ("published", PUBLISHED)):
        flat = settings | flat | {"train_iters": 1, "save": str(tmp_path / name)}
        runs[name] = run_ranks(curve, 1, flat, 1, save=True)[0]["losses"][0]
    assert runs["new"] == runs["viewer"]
    assert abs(runs["new"][1] - runs["published"][1]) > 1e-4
    assert {name: conversion_of(tmp_path / name) for name in runs} == {
        "new": "viewer",
        "viewer": "viewer",
        "published": "published",
    }
    for name in ("new", "published"):  # whatever it was, it goes on with it
        flat = {
            "train_iters": 2,
            "lr_continue": "schedule",
            "init_from": "",
            "load": str(tmp_path / name),
            "save": str(tmp_path / f"{name}2"),
        }
        run_ranks(curve, 1, settings | flat, 1, save=True)
        assert conversion_of(tmp_path / f"{name}2") == conversion_of(tmp_path / name)
    file = next(Path(settings["image_folder"]).iterdir())
    for name in ("new", "published"):
        check_exports(tmp_path / name / "checkpoints", tmp_path / f"hf_{name}", file)


def check_exports(checkpoint: Path, folder: Path, file: Path) -> None:
    """What both exports show a model, by the project's own code, is what training showed it."""
    vision = Manifest.read(resolve_checkpoint(checkpoint)).model.vision
    expected = decode_image(file.read_bytes(), file.name, vision.image_conversion)
    for form in ("ross", "llava"):
        export_checkpoint(checkpoint, folder / form, form, templates=chat_template)
        model, processor = load_for_inference(str(folder / form))
        assert model_rgb(model, open_image(file)).tobytes() == expected.tobytes()
        if isinstance(processor, RossProcessor):
            processor.save_pretrained(folder / "again")
            for prepare in (processor, RossProcessor.from_pretrained(folder / "again")):
                assert (prepare.pixels([open_image(file)])[0] == prepare.image_transform(expected)).all()
    stored = json.loads((folder / "ross" / "config.json").read_text())
    assert stored.get("image_conversion", "published") == vision.image_conversion


def test_older_checkpoints_are_published(settings: dict[str, Any], tmp_path: Path) -> None:
    start = start_of(RunConfig.from_flat(settings))
    stored = start.manifest.model.to_dict()
    assert stored["vision"].pop("image_conversion") == "published"
    model = RossModelConfig.from_dict(json.loads(json.dumps(stored)))
    assert model.vision.image_conversion == "published"
    assert (start.directory / MANIFEST_NAME).is_file()
    resumed = dataclasses.replace(start, resumes=True)
    for given, new, again in (
        ({}, "viewer", "published"),
        (PUBLISHED, "published", "published"),
        (VIEWER, "viewer", "viewer"),
    ):
        run = RunConfig.from_flat(settings | given)
        assert with_image_conversion(run, None).data.image_conversion == new
        assert with_image_conversion(run, start).data.image_conversion == new
        assert with_image_conversion(run, resumed).data.image_conversion == again


def test_a_manifest_that_says_something_else_is_refused(settings: dict[str, Any]) -> None:
    model = start_of(RunConfig.from_flat(settings)).manifest.model
    wrong = dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_conversion="browser"))
    with pytest.raises(ValueError, match=r"vision\.image_conversion is 'browser', it must be 'viewer' or 'published'"):
        check_model(wrong)
    shown = dataclasses.replace(model, vision=model.vision.shown(None, "viewer"))
    assert shown != model
    assert shown.same_tensors == model.same_tensors
