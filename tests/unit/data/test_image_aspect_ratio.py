"""`image_aspect_ratio` of a run: the images of its data set, whatever its checkpoint was trained with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import CLIPImageProcessor, SiglipImageProcessor

from megatron_ross.config.model import VisionConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.data.images import ImageProcessor
from megatron_ross.training.data import build_dataset, build_valid_dataset
from tests.unit.data.conftest import GOLDEN, chat

SIDE = 56
PICTURE = "portrait.jpg"  # 132 x 220 pixels


def vision_of(tower: str, stored_mode: str) -> VisionConfig:
    folder = GOLDEN / f"vision_{tower}"
    images = json.loads((folder / "preprocessor_config.json").read_text())
    hf_config = json.loads((folder / "config.json").read_text()) | {"image_size": SIDE}
    mean, std = tuple(images["image_mean"]), tuple(images["image_std"])
    return VisionConfig(hf_config.get("vision_config", hf_config), mean, std, image_aspect_ratio=stored_mode)


def seen(vision: VisionConfig, folder: Path, **settings: Any) -> list[torch.Tensor]:
    """The picture as training and as validation give it to the tower."""
    (folder / "data.json").write_text(json.dumps([{"id": 0, "image": PICTURE, "conversations": chat("<image>", "A")}]))
    paths = {"data_path": str(folder / "data.json"), "image_folder": str(GOLDEN / "preprocess" / "images")}
    paths |= {f"valid_{name}": path for name, path in paths.items()}
    run = RunConfig.from_flat(paths | settings)
    training = build_dataset(run, vision, GOLDEN / "llm_qwen2")
    valid = build_valid_dataset(run, vision, GOLDEN / "llm_qwen2")
    assert valid is not None
    assert training.image_processor == valid.image_processor  # which DALI and the keys of cached latents are made from
    return [dataset[0].images[0].load_pixels() for dataset in (training, valid)]


def published(tower: str, mode: str) -> np.ndarray:
    """uint8 [3, P, P] as the published code makes them."""
    return load_file(GOLDEN / "preprocess" / "images_uint8.safetensors")[f"{PICTURE}|{tower}|{SIDE}|{mode}"]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("stored_mode", ["pad", "square"])
@pytest.mark.parametrize("asked", ["pad", "square", None])
def test_a_run_sees_what_it_asks_for(asked: str | None, stored_mode: str, tower: str, tmp_path: Path) -> None:
    vision = vision_of(tower, stored_mode)
    wanted = published(tower, asked or stored_mode)
    assert not np.array_equal(published(tower, "pad"), published(tower, "square"))
    mean, std = (torch.tensor(values)[:, None, None] for values in (vision.image_mean, vision.image_std))
    for pixels in seen(vision, tmp_path, image_aspect_ratio=asked):
        values = ((pixels * std + mean) * 255).round().numpy()
        difference = np.abs(values - wanted)  # other versions of Pillow round a few values differently
        assert difference.max() <= 4
        assert difference.mean() <= 0.4


@pytest.mark.parametrize(("tower", "kind"), [("clip", CLIPImageProcessor), ("siglip", SiglipImageProcessor)])
def test_square_is_the_towers_own_processor(tower: str, kind: Any, tmp_path: Path) -> None:
    """As the published stage 1 calls it: `processor.preprocess(image)`, nothing before."""
    vision = vision_of(tower, "pad")
    mean, std = list(vision.image_mean), list(vision.image_std)
    size = {"shortest_edge": SIDE} if tower == "clip" else {"height": SIDE, "width": SIDE}
    crop = {"crop_size": {"height": SIDE, "width": SIDE}} if tower == "clip" else {}
    theirs = kind(size=size, image_mean=mean, image_std=std, resample=Image.Resampling.BICUBIC, **crop)
    image = Image.open(GOLDEN / "preprocess" / "images" / PICTURE).convert("RGB")
    expected = theirs.preprocess(image, return_tensors="pt")["pixel_values"][0]
    for pixels in seen(vision, tmp_path, image_aspect_ratio="square"):
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    padded = ImageProcessor.from_config(replace(vision, image_aspect_ratio="pad"))(image)
    assert (padded - expected).abs().max() > 0.1
