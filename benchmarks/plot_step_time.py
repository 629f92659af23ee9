"""Where a step's time and memory go, as one picture: measured seconds by part, predicted bytes of the 7B recipes.

    python benchmarks/plot_step_time.py

Left: bench_step.py's figures. Right: the planner's, for the published recipes on 8 H100 as examples/ configure them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse
import matplotlib

from megatron_ross.config.cli import parse_run_config
from megatron_ross.convert.known_models import known_model
from megatron_ross.planner.hardware import known_gpu
from megatron_ross.planner.search import plan_run

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("decoder", "head", "denoiser", "vae", "tower", "projector", "optimizer", "other")
MEMORY = ("parameters", "gradients", "optimizer", "activations", "workspace", "reserve")
RECIPES = {1: "pretrain_siglip_qwen2", 2: "finetune_siglip_qwen2"}


def stacked(axes: Axes, labels: list[str], columns: list[dict[str, float]], kinds: tuple[str, ...]) -> None:
    """Horizontal bars; `columns` holds the sizes of each bar's pieces."""
    left = [0.0] * len(columns)
    for kind in kinds:
        values = [column.get(kind, 0.0) for column in columns]
        axes.barh(labels, values, left=left, label=kind)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.margins(x=0.02)
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def measured(figures: dict[str, Any]) -> tuple[list[str], list[dict[str, float]]]:
    """Seconds per sample by part, of every stage and row."""
    labels, columns = [], []
    for stage, result in figures["stages"].items():
        per_step = sum(result["samples"]) / len(result["samples"])
        for name, row in result["rows"].items():
            labels.append(f"stage {stage}\n{name}")
            columns.append({part: seconds / per_step for part, seconds in row["part_seconds"].items()})
    return labels, columns


def predicted() -> tuple[list[str], list[dict[str, float]]]:
    """GiB by category on one of 8 H100."""
    labels, columns = [], []
    for stage, recipe in RECIPES.items():
        files = [f"shared/stage{stage}.yaml", f"ross/{recipe}.yaml", f"layouts/8xh100-stage{stage}.yaml"]
        run = parse_run_config([word for file in files for word in ("--config", str(ROOT / "examples" / file))])
        plan = plan_run(run, known_model("qwen2-7b+siglip-so400m"), 8, known_gpu("h100"))
        labels.append(f"stage {stage}")
        columns.append({name: value / 2**30 for name, value in asdict(plan.peak_memory).items()})
    return labels, columns


def main(results: Path = ROOT / "benchmarks/results", output: Path = ROOT / "docs/images/step_time.png") -> None:
    """Draw.

    Args:
        results: folder with bench_step.py's step_1_cpu.json and step_2_cpu.json.
        output: a PNG file.
    """
    steps = [json.loads((results / f"step_{stage}_cpu.json").read_text()) for stage in (1, 2)]
    labels, columns = zip(*(pair for figures in steps for pair in zip(*measured(figures), strict=True)), strict=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    stacked(left, list(labels), list(columns), PARTS)
    where = f"{steps[0]['machine']}, commit {steps[0]['commit']}"
    left.set_title(f"measured: seconds per sample, CPU size\n{where}", fontsize=9)
    stacked(right, *predicted(), MEMORY)
    right.set_title("predicted: GiB per GPU, Qwen2-7B + SigLIP\nRoss recipes on 8 x H100", fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
