"""tools/ablate.py end to end on golden components: real programs, a report, and nothing done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import golden
from tests.helpers.toy_run import write_data

ROOT = Path(__file__).resolve().parents[4]


def write_inputs(folder: Path) -> Path:
    """Data, questions, a shared training file and an ablation of three arms; returns the ablation's path."""
    data = write_data(folder / "data", 12)
    images = sorted((folder / "data" / "images").iterdir())[:3]
    (folder / "questions.json").write_text(
        json.dumps(
            [
                {
                    "image": image.name,
                    "question_type": kind,
                    "conversations": [{"from": "human", "value": f"<image>\n{kind}?"}, {"from": "gpt", "value": "a"}],
                }
                for image in images
                for kind in ("digit", "count")
            ]
        )
    )
    training: dict[str, Any] = {**data, "train_iters": 2, "global_batch_size": 2, "seq_length": 256}
    training |= {"layout": "VEt*4NDH", "tensorboard": False, "num_workers": 1, "log_interval": 1}
    (folder / "train.yaml").write_text(yaml.safe_dump(training))
    ablation = {
        "train": [str(folder / "train.yaml")],
        "output": str(folder / "arms"),
        "start": {
            "llm": str(golden.GOLDEN / "llm_qwen2"),
            "vision_tower": str(golden.GOLDEN / "vision_siglip"),
            "vae": str(golden.GOLDEN / "vae"),
            "denoiser_width": 64,
            "train": [str(folder / "train.yaml")],
        },
        "questions": str(folder / "questions.json"),
        "image_folder": data["image_folder"],
        "paint": {"images": data["image_folder"], "limit": 2, "steps": "3"},
        "groups": [
            {
                "title": "On and off",
                "arms": {"off": {"recon_loss_weight": 0}, "denoise": {}, "regress": {"recon_objective": "regress"}},
                "comparisons": [["denoise", "off"], ["denoise", "regress"]],
            }
        ],
    }
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(ablation, sort_keys=False))
    return path


def ablate(path: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/ablate.py", "--config", str(path), "--seeds", "1", "--jobs", "2", *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_ablation_end_to_end(tmp_path: Path) -> None:
    path = write_inputs(tmp_path)
    first = ablate(path)
    assert first.returncode == 0, first.stderr
    report = tmp_path / "arms" / "report.md"
    text = report.read_text()
    assert "| denoise - off | accuracy |" in text
    results = json.loads((tmp_path / "arms" / "report.json").read_text())["results"]
    assert {name: bool(by_seed["1"]["figures"]) for name, by_seed in results.items()} == {
        "off": False,
        "denoise": True,
        "regress": True,
    }
    assert results["off"]["1"]["curves"]["recon_loss"] == [0, 0]
    # Same start and same batch: the language-model loss of the first step is the same.
    assert len({by_seed["1"]["curves"]["lm_loss"][0] for by_seed in results.values()}) == 1
    assert len({by_seed["1"]["samples"] for by_seed in results.values()}) == 1
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "arms").rglob("result.json")}
    second = ablate(path)
    assert second.returncode == 0, second.stderr
    assert "3 runs, 3 of them finished before" in second.stdout
    assert report.read_text() == text
    assert {file: file.stat().st_mtime_ns for file in written} == written
    (tmp_path / "questions.json").write_text("[]")
    third = ablate(path)
    assert third.returncode == 1
    assert "off/seed1 was run with other settings (questions): remove it, or name another output" in third.stderr


@pytest.mark.slow
def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    path = write_inputs(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["groups"][0]["arms"]["denoise"] = {"layout": "VEt*3NDH"}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    failed = ablate(path)
    assert failed.returncode == 1
    assert "error: denoise, seed 1: training failed with exit code 1: error: layout" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
