"""The kernel benchmark where there is no GPU: it says so, and its dry run goes through every case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = "benchmarks/bench_kernels.py"


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(repository / "kernels")}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=repository, env=environment, capture_output=True, text=True
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_explains_itself(repository: Path) -> None:
    done = run(repository)
    assert done.returncode == 2
    assert done.stderr.startswith("error: kernel speed can only be measured on a CUDA GPU")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_dry_run(repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = run(repository, "--dry-run", "--dtypes", "[fp32]", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    figures = json.loads(path.read_text())
    assert figures["dry_run"]
    assert len(figures["results"]) == 8
    for result in figures["results"]:
        assert result["name"] in done.stdout
        assert result["ratio_to_eager"] > 0
        assert result["ratio_to_compile"] > 0
