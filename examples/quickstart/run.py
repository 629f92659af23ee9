"""`make quickstart`: every step from drawing the data to the report, in a fresh folder.

    python examples/quickstart/run.py

Each step is the command a user would type, run as a process of its own. The run stops at the first step that fails, and
fails as well when the result misses a gate (see `gates.py`). Ctrl-C ends every process.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from megatron_ross.programs import end_group, start_program

ROOT = Path(__file__).resolve().parents[2]
HERE = "examples/quickstart"
RUN = Path("runs/quickstart")  # the YAML files name it too
DENOISER_WIDTH = 96
# 91 steps from timestep 900 down. Near 1000 almost nothing of the image is left, and to get at it from predicted noise
# one divides by almost zero: a denoiser trained for minutes is not exact enough for that, one trained for days is.
SAMPLING_STEPS = "10,10,10,10,10,10,10,10,10,1"
NUM_RECONSTRUCTIONS = 8
GRACE_S = 20.0  # for processes to end by themselves


@dataclass(frozen=True)
class Step:
    """A heading and the command to run under it, relative to the repository."""

    heading: str
    command: list[str]


@dataclass(frozen=True)
class Ranks:
    """How many ranks train, and what must be said beyond the YAML files, which are for four ranks."""

    count: int
    sizes: str
    flags: tuple[str, ...] = ()


def choose_ranks(num_gpus: int) -> Ranks:
    """Four ranks on CPUs or at least four GPUs; with fewer GPUs one or two, because each rank needs its own."""
    if num_gpus == 0 or num_gpus >= 4:
        return Ranks(4, "TP 2 x PP 2")
    if num_gpus == 1:
        flags = ("--tensor-model-parallel-size=1", "--pipeline-model-parallel-size=1", "--layout=VEt*4NDH")
        return Ranks(1, "one GPU", flags)
    return Ranks(2, "PP 2", ("--tensor-model-parallel-size=1",))


def plan(seed: int, num_images: int, ranks: Ranks) -> list[Step]:
    """All steps in order."""
    python, data, components = sys.executable, f"{RUN}/data", f"{RUN}/components"
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks.count)]
    name = f"{ranks.count} rank(s), {ranks.sizes}"
    return [
        Step(
            "data: images and conversations from a seed",
            [python, f"{HERE}/make_data.py", "--output", data, "--seed", str(seed), "--num_images", str(num_images)],
        ),
        Step(
            "components: small Qwen2, SigLIP and AutoencoderKL in Hugging Face format",
            [python, f"{HERE}/make_components.py", "--data", data, "--output", components, "--seed", str(seed)],
        ),
        Step(
            "conversion: Hugging Face -> Megatron",
            [
                *(python, "tools/convert_hf_to_megatron.py", "--llm", f"{components}/llm"),
                *("--vision-tower", f"{components}/vision_tower", "--vae", f"{components}/vae"),
                *("--denoiser-type", "denoiser_vit3x", "--denoiser-width", str(DENOISER_WIDTH)),
                *("--seed", str(seed), "--output", f"{RUN}/megatron"),
            ],
        ),
        Step(
            f"stage 1: captions on {name}",
            [*torchrun, "pretrain_ross.py", "--config", f"{HERE}/stage1.yaml", *ranks.flags],
        ),
        Step(
            f"stage 2: questions on {name}",
            [*torchrun, "pretrain_ross.py", "--config", f"{HERE}/stage2.yaml", *ranks.flags],
        ),
        Step(
            "export: Megatron -> Hugging Face",
            [
                *(python, "tools/convert_megatron_to_hf.py", "--checkpoint", f"{RUN}/stage2/checkpoints"),
                *("--format", "ross", "--output", f"{RUN}/hf"),
            ],
        ),
        *evaluation_steps(data),
    ]


def evaluation_steps(data: str) -> list[Step]:
    """What is done with the exported checkpoint."""
    python = sys.executable
    return [
        Step(
            "answers: held-out questions, with images and with blank ones",
            [
                *(python, f"{HERE}/answer.py", "--checkpoint", f"{RUN}/hf"),
                *("--data", data, "--output", f"{RUN}/answers.json"),
            ],
        ),
        Step(
            "reconstruction: held-out images painted from the language model's outputs",
            [
                *(python, "tools/reconstruct.py", "--checkpoint", f"{RUN}/hf", "--images", f"{data}/images/heldout"),
                *("--output", f"{RUN}/reconstructions", "--steps", SAMPLING_STEPS),
                *("--limit", str(NUM_RECONSTRUCTIONS)),
            ],
        ),
        Step("report", [python, f"{HERE}/report.py", "--run", str(RUN)]),
    ]


def run_step(step: Step) -> int:
    """Run one command in a process group of its own; returns its exit code. However we leave, the group is gone."""
    process = start_program(step.command, ROOT)
    try:
        return process.wait()
    finally:
        end_group(process, GRACE_S)


def timing_table(seconds: dict[str, float]) -> Table:
    """Wall time of every step."""
    table = Table(title="quickstart", show_footer=True)
    table.add_column("step", footer="total")
    table.add_column("seconds", f"{sum(seconds.values()):.1f}", justify="right")
    for heading, spent in seconds.items():
        table.add_row(heading.partition(":")[0], f"{spent:.1f}")
    return table


def quickstart(seed: int = 0, num_images: int = 4000) -> None:
    """Run everything.

    Args:
        seed: of data, components and initial weights.
        num_images: JPEG files to draw.
    """
    console = Console(highlight=False)
    shutil.rmtree(ROOT / RUN, ignore_errors=True)
    seconds: dict[str, float] = {}
    steps = plan(seed, num_images, choose_ranks(torch.cuda.device_count()))
    for number, step in enumerate(steps, start=1):
        console.rule(f"[bold]{number}/{len(steps)}[/bold] {step.heading}", align="left")
        begin = time.monotonic()
        code = run_step(step)
        seconds[step.heading] = time.monotonic() - begin
        if code:
            sys.exit(f"error: step {number} ({step.heading}) failed with exit code {code}")
    console.print(timing_table(seconds))
    print(ROOT / RUN / "report.html")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        auto_cli(quickstart, as_positional=False)
    except KeyboardInterrupt:
        sys.exit("interrupted")
