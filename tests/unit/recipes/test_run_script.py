"""examples/run.sh starts the documented command; the README's table is what the planner says today."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.sources import ROOT

SHARED, RECIPE = "examples/shared/stage2.yaml", "examples/ross/finetune_siglip_qwen2.yaml"


def run(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script beside a `torchrun` that prints its arguments."""
    stand_in = tmp_path / "torchrun"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("NNODES", "GPUS_PER_NODE")}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    command = ["examples/run.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_one_machine(tmp_path: Path) -> None:
    done = run(tmp_path, "ross/finetune_siglip_qwen2", "8xh100", "--lr", "1e-5")
    layout = "examples/layouts/8xh100-stage2.yaml"
    assert done.stdout.split() == [
        *("--standalone", "--nproc-per-node", "8", "pretrain_ross.py"),
        *("--config", SHARED, "--config", RECIPE, "--config", layout, "--lr", "1e-5"),
    ]


def test_images_alone_use_the_layout_of_stage_1(tmp_path: Path) -> None:
    words = run(tmp_path, "images/tune_siglip_qwen2", "8xh100").stdout.split()
    files = ("shared/images.yaml", "images/tune_siglip_qwen2.yaml", "layouts/8xh100-stage1.yaml")
    assert words[4:] == [word for file in files for word in ("--config", f"examples/{file}")]


def test_several_machines(tmp_path: Path) -> None:
    machines = {"NNODES": "8", "NODE_RANK": "3", "MASTER_ADDR": "10.0.0.1"}
    words = run(tmp_path, "ross/finetune_siglip_qwen2", "64xh100", **machines).stdout.split()
    assert words[:4] == ["--nnodes", "8", "--nproc-per-node", "8"]
    assert words[-7:] == [
        *("pretrain_ross.py", "--config", SHARED, "--config", RECIPE),
        *("--config", "examples/layouts/64xh100-stage2.yaml"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: examples/run.sh RECIPE CLUSTER"),
        (("ross/tune", "8xh100"), "name a file of examples/ross or examples/llava"),
        (("ross/finetune_dino_qwen2", "8xh100"), "no recipe examples/ross/finetune_dino_qwen2.yaml"),
        (("ross/finetune_siglip_qwen2", "9xh100"), "examples/layouts has 8xa100-80g, 8xh100 and 64xh100"),
        (("ross/finetune_siglip_qwen2", "64xh100"), "set NNODES, NODE_RANK and MASTER_ADDR"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_readme_has_the_table_of_today() -> None:
    done = subprocess.run(
        [sys.executable, "tools/recipe_table.py"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout in (ROOT / "README.md").read_text(), "put the output of tools/recipe_table.py into README.md"
