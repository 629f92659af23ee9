"""The quality curve: points of a model that samples and of one that does not, the plot, and the tool's mistakes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_ross.checkpoint.manifest import iteration_dir, write_latest
from megatron_ross.evaluation.quality import QualityPoint, plot_quality
from tests.helpers import golden
from tests.helpers.variants import make_variant, without_denoiser

ROOT = Path(__file__).resolve().parents[3]
IMAGES = golden.GOLDEN / "preprocess" / "images"


def run_tool(*arguments: str) -> int:
    spec = importlib.util.spec_from_file_location("quality_tool", ROOT / "tools" / "reconstruction_quality.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*arguments, "--images", str(IMAGES), "--limit", "1", "--device", "cpu"])


def test_every_checkpoint_and_every_respacing_gets_a_point(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    imported = make_variant(tmp_path / "model", "qwen2_siglip").path
    for iteration in (5, 10):
        iteration_dir(root, iteration).parent.mkdir(parents=True, exist_ok=True)
        iteration_dir(root, iteration).symlink_to(imported)
    write_latest(root, 10)
    out = tmp_path / "out"
    assert run_tool("--run", str(tmp_path / "run"), "--output", str(out), "--steps", "3", "6,6,1") == 0
    points = json.loads((out / "quality.json").read_text())
    assert [(p["iteration"], p["steps"], p["sampling_steps"]) for p in points] == [
        (5, "6,6,1", 13),
        (10, "3", 3),
        (10, "6,6,1", 13),
    ]
    assert points[0]["reconstruction_psnr"] == pytest.approx(points[2]["reconstruction_psnr"])
    assert points[0]["vae_psnr"] == pytest.approx(points[1]["vae_psnr"])
    with Image.open(out / "quality.png") as picture:
        picture.load()


def test_runs_that_cannot_be_measured_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("--run", str(tmp_path), "--output", str(tmp_path / "out")) == 1
    assert "is no run folder with checkpoints/" in capsys.readouterr().err
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    assert run_tool("--run", str(tmp_path / "begun"), "--output", str(tmp_path / "out")) == 1
    assert "is a run folder that has no checkpoint yet" in capsys.readouterr().err
    plain = make_variant(tmp_path / "model", "qwen2_siglip", without_denoiser).path
    iteration_dir(tmp_path / "run" / "checkpoints", 3).parent.mkdir(parents=True)
    iteration_dir(tmp_path / "run" / "checkpoints", 3).symlink_to(plain)
    assert run_tool("--run", str(tmp_path / "run"), "--output", str(tmp_path / "out")) == 1
    assert "no denoiser and auto-encoder" in capsys.readouterr().err


def test_one_point_is_enough_for_a_plot(tmp_path: Path) -> None:
    plot_quality([QualityPoint(10, None, 1, 4, 30.0, 0.9, 20.0, 0.5)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
