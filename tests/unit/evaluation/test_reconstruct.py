"""tools/reconstruct.py and what is behind it: panels, figures, errors, on the golden checkpoint."""

from __future__ import annotations

import csv
import functools
import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_ross.evaluation.generate import load_for_inference
from megatron_ross.evaluation.options import image_files
from megatron_ross.evaluation.reconstruct import figures, reconstruct_folder
from megatron_ross.models.pictures import PANEL_GAP_PX, side_by_side, to_pil
from tests.helpers import golden

ROOT = Path(__file__).resolve().parents[3]
IMAGES = golden.GOLDEN / "preprocess" / "images"


@functools.cache
def loaded() -> tuple[Any, Any]:
    return load_for_inference(str(golden.checkpoint_dir("llama_clip")), device="cpu")


def run_tool(output: Path, *extra: str) -> int:
    """Exit status of tools/reconstruct.py on the golden images."""
    spec = importlib.util.spec_from_file_location("reconstruct_tool", ROOT / "tools" / "reconstruct.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    checkpoint = str(golden.checkpoint_dir("llama_clip"))
    where = ["--checkpoint", checkpoint, "--images", str(IMAGES), "--output", str(output), "--device", "cpu"]
    return module.main([*where, *extra])


def test_tool_writes_panels_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(tmp_path / "out", "--steps", "3", "--limit", "3", "--batch-size", "2") == 0
    assert "3 images in" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "figures.csv").open()))
    names = sorted(path.name for path in IMAGES.iterdir())[:3]
    assert [row["file"] for row in rows] == names
    for row in rows:
        assert 0 < float(row["vae_psnr"]) < 100
        assert -1 <= float(row["reconstruction_ssim"]) <= 1
        with Image.open(tmp_path / "out" / f"{row['file']}.png") as picture:
            assert picture.size == (3 * 64 + 2 * PANEL_GAP_PX, 64)


def test_panels_are_input_round_trip_and_reconstruction(tmp_path: Path) -> None:
    model, processor = loaded()
    (tmp_path / "in").mkdir()
    shutil.copy(IMAGES / "square.png", tmp_path / "in")
    reconstruct_folder(model, processor, tmp_path / "in", tmp_path / "out", steps="6,6,1", seed=3)
    row = np.asarray(Image.open(tmp_path / "out" / "square.png.png"))
    source = Image.open(IMAGES / "square.png")
    pixels = processor.pixels([source])
    encoder = model.latent_encoder
    panels = [
        to_pil(encoder.vae_input(pixels))[0],
        to_pil(encoder.round_trip(pixels))[0],
        model.reconstruct([source], steps="6,6,1", seed=3, processor=processor)[0],
    ]
    for i, panel in enumerate(panels):
        left = i * (64 + PANEL_GAP_PX)
        assert np.array_equal(row[:, left : left + 64], np.asarray(panel))


def test_results_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    runs = [
        reconstruct_folder(*loaded(), IMAGES, tmp_path / str(size), steps="6,6,1", batch_size=size, limit=4)
        for size in (1, 4)
    ]
    for one, four in zip(*runs, strict=True):
        assert one.file == four.file
        assert one.reconstruction_psnr == pytest.approx(four.reconstruction_psnr, abs=0.05)


def test_figures_against_their_definitions() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 200, (32, 32, 3), dtype=np.uint8)
    brighter = (target + 10).astype(np.uint8)
    result = figures("x", *(Image.fromarray(a) for a in (target, target, brighter)))
    assert math.isinf(result.vae_psnr)
    assert result.vae_ssim == pytest.approx(1)
    assert result.reconstruction_psnr == pytest.approx(20 * math.log10(255 / 10))
    assert 0.9 < result.reconstruction_ssim < 1


def test_side_by_side_keeps_order() -> None:
    row = side_by_side([Image.new("RGB", (5, 4), colour) for colour in ("red", "lime", "blue")])
    at = [row.getpixel((i * (5 + PANEL_GAP_PX), 0)) for i in range(3)]
    assert at == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        image_files(tmp_path)
    with pytest.raises(ValueError, match="is not a folder of images"):
        image_files(tmp_path / "missing")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--steps", "2000"], "asks for 2000 steps"),
        (["--steps", "fast"], "is not a comma-separated list"),
        (["--batch-size", "0"], "batch_size=0: must be at least 1"),
    ],
)
def test_tool_tells_mistakes_on_one_line(
    extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(tmp_path / "out", *extra) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
