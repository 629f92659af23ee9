"""A small ablation, and results as its runs would leave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from megatron_ross.evaluation.ablation.conditions import conditions_of
from megatron_ross.evaluation.ablation.execute import overlay
from megatron_ross.evaluation.ablation.plan import AblationConfig, read_ablation, runs_of
from megatron_ross.evaluation.ablation.results import RESULT_NAME
from megatron_ross.models.pictures import side_by_side

Change = Callable[[dict[str, Any]], None]


def ablation_values(folder: Path) -> dict[str, Any]:
    """A valid ablation as YAML would hold it."""
    return {
        "train": ["train.yaml"],
        "output": str(folder / "arms"),
        "start": {"llm": "llm", "vision_tower": "tower", "vae": "vae", "denoiser_width": 96, "train": ["align.yaml"]},
        "questions": "heldout.json",
        "image_folder": "images",
        "paint": {"images": "images/heldout", "limit": 2, "steps": "6,6,1"},
        "shared": {"train_iters": 7},
        "groups": [
            {
                "title": "On and off",
                "arms": {"off": {"recon_loss_weight": 0}, "denoise": {}, "regress": {"recon_objective": "regress"}},
                "comparisons": [["denoise", "off"], ["regress", "off"]],
            },
            {
                "title": "Weight",
                "seeds": 1,
                "arms": {"weight-3": {"recon_loss_weight": 3}},
                "comparisons": [["weight-3", "off"]],
            },
        ],
    }


def write_ablation(folder: Path, *changes: Change) -> Path:
    """The ablation and the files that it names; `folder` is the root of their paths."""
    for name, text in {"train.yaml": "lr: 0.1 # high\n", "align.yaml": "lr: 0.2\n", "heldout.json": "[]\n"}.items():
        (folder / name).write_text(text)
    values = ablation_values(folder)
    for change in changes:
        change(values)
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def config(tmp_path: Path) -> AblationConfig:
    return read_ablation(write_ablation(tmp_path))


def write_results(config: AblationConfig, seeds: int, accuracy: dict[str, list[float]]) -> None:
    """result.json and pictures of every run; `accuracy` per arm and seed is that of both categories."""
    for run in runs_of(config, seeds):
        value = accuracy[run.arm.name][run.seed - 1]
        scores = {name: {"digit": value, "count": value, "all": value} for name in ("accuracy", "loss")}
        names = ("vae_psnr", "vae_ssim", "reconstruction_psnr", "reconstruction_ssim")
        result = {
            "settings": overlay(config, run),
            "conditions": conditions_of(config, Path(config.output).parent),
            "samples": f"order of seed {run.seed}",
            "scores": scores,
            "figures": dict.fromkeys(names, 20.0) if run.arm.reconstructs else {},
            "curves": {
                "iteration": [1.0, 2.0],
                "lm_loss": [2.0, 1.0],
                "recon_loss": [1.0, 0.5] if run.arm.reconstructs else [0.0, 0.0],
            },
            "seconds_per_iteration": 0.5,
            "minutes": 2.0 + run.seed,
        }
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / RESULT_NAME).write_text(json.dumps(result))
        if run.arm.reconstructs:
            (run.folder / "reconstructions").mkdir(exist_ok=True)
            row = side_by_side([Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")])
            row.save(run.folder / "reconstructions" / "0.jpg.png")
