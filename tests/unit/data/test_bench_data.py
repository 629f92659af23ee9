"""The data benchmark runs, and its figures say where they come from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_figures_name_their_origin(repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    flags = ["--num_images", "16", "--image_size", "56", "--batch_size", "4", "--num_workers", "1", "--rounds", "1"]
    command = [sys.executable, "benchmarks/bench_data.py", *flags, "--json", str(path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert {"date", "machine", "versions", "command", "commit", "settings"} <= figures.keys()
    assert figures["command"].startswith("python benchmarks/bench_data.py --num_images 16")
    assert {"torch", "pillow", "dali", "transformers"} <= figures["versions"].keys()
    for name, rates in figures["images_per_second"].items():
        assert rates[0] > 0
        assert name in done.stdout
    assert {"plain PyTorch DataLoader", "engine, pillow"} <= figures["images_per_second"].keys()
