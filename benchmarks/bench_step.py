"""Training steps of this project and of a plain Hugging Face implementation, on the same samples, with the same losses.

    python benchmarks/bench_step.py --json step.json                       # CPU size, both stages
    python benchmarks/bench_step.py --size gpu --dtype bf16 --tf32 true --stages [1]   # Qwen2-7B's widths on one GPU
    python benchmarks/bench_step.py --size gpu --dtype bf16 --settings '{fp8: hybrid}' --rows '[ours]'

The rows take turns in one process, each round in the opposite order of the round before; every round is another step.
Reading and decoding data is not part of it (bench_data.py). The ratio is that of samples per second, round by round.
Peak memory on a GPU is that of a row's own allocations; on a CPU, resident memory beyond what imports took, in a
process that runs a row alone. MFU is against the rate of a large matrix product in `dtype`, measured in the same run.
"""

from __future__ import annotations

import json as json_module
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import psutil
import torch
from environment import environment
from step_ours import start_single_process
from step_rows import ALL_ROWS, DTYPES, NUM_DRAWS, SEED, Row, RowName, build_rows, work_of
from step_samples import Pack, plan_steps
from step_sizes import CAPTIONS, CONVERSATIONS, VICUNA_MLP_RATIO, SizeName, StepSize, step_size
from step_timeline import clock

from megatron_ross.config.schema import TrainabilityConfig
from megatron_ross.planner.flops import Trained, module_flops
from megatron_ross.platform import current_device

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference of a loss between rows. fp16 moments of a cache round, too."""


def measure(rows: list[Row], steps: list[list[Pack]], tolerance: float, max_seconds: float) -> int:
    """A warm-up step, then a timed one per round; losses are compared after every one.

    No round starts after `max_seconds`, but the first always does. Returns the number of timed rounds.
    """
    is_gpu, begin = torch.cuda.is_available(), clock()
    for number, packs in enumerate(steps):
        for row in rows if number % 2 else rows[::-1]:
            # Borders of parts cost nothing on a CPU; a GPU has to wait there, so it gets a step of its own.
            row.timeline.enabled = number == len(steps) - 1 if is_gpu else number > 0
            row.run(packs, timed=number > 0 and not (is_gpu and row.timeline.enabled))
            print(f"step {number} of {len(steps) - 1}, {row.name}", file=sys.stderr, flush=True)
        assert_same_losses(rows, tolerance)
        if number > 0 and clock() - begin > max_seconds:
            break
    return len(rows[0].seconds)


def assert_same_losses(rows: list[Row], tolerance: float) -> None:
    """Every row's losses of the last step against the last row's.

    Raises:
        RuntimeError: they differ; no figure is given for another computation.
    """
    expected = rows[-1].losses[-1]
    for row in rows[:-1]:
        for name, got, want in zip(("lm", "reconstruction"), row.losses[-1], expected, strict=True):
            if not abs(got - want) <= tolerance * abs(want):
                raise RuntimeError(f"{name} loss of {row.name} is {got}, of {rows[-1].name} {want}; not timed")


def ratios(rates: dict[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """Samples per second of every row over the baseline's, round by round."""
    result = {}
    for name, values in rates.items():
        if name != baseline:
            rounds = [rate / base for rate, base in zip(values, rates[baseline], strict=True)]
            result[name] = {
                "rounds": rounds,
                "median": statistics.median(rounds),
                "min": min(rounds),
                "max": max(rounds),
            }
    return result


def matmul_flops_per_second(dtype: str) -> float:
    """The best of five products of two square matrices."""
    side = 8192 if torch.cuda.is_available() else 2048
    a = torch.randn(side, side, device=current_device(), dtype=DTYPES[dtype])
    best = float("inf")
    for _ in range(6):
        begin = clock()
        a @ a
        best = min(best, clock() - begin)
    return 2 * side**3 / best


def run_stage(
    stage: int, size: StepSize, names: tuple[RowName, ...], dtype: str, tf32: bool, rounds: int,
    micro_batch_size: int, settings: dict[str, Any], max_seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Figures of one stage of training."""
    start_single_process()
    num_steps = 1 + rounds + torch.cuda.is_available()
    texts = CAPTIONS if stage == 1 else CONVERSATIONS
    steps = plan_steps(size, size.seq_length[stage], texts, num_steps, SEED)
    before = psutil.Process().memory_info().rss
    rows = build_rows(names, size, stage, dtype, tf32, micro_batch_size, settings, steps)
    rounds = measure(rows, steps, LOSS_TOLERANCE[dtype], max_seconds)
    timed = steps[1 : 1 + rounds]
    samples = [sum(len(pack) for pack in packs) for packs in timed]
    rates = {row.name: [n / s for n, s in zip(samples, row.seconds, strict=True)] for row in rows}
    cpu = {row.name: [n / s for n, s in zip(samples, row.cpu_seconds, strict=True)] for row in rows}
    trained = Trained.of(TrainabilityConfig(freeze_language_model=stage == 1))
    parts = [part_flops(packs, size, trained) for packs in timed]
    watched = [part_flops(steps[-1], size, trained)] if torch.cuda.is_available() else parts
    flops = [sum(step.values()) for step in parts]
    rate = matmul_flops_per_second(dtype)
    if torch.cuda.is_available():
        memory: dict[str, Any] = {"row_peak_memory_mib": {row.name: row.peak_bytes / 2**20 for row in rows}}
    else:
        most = 2**10 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = {"peak_memory_mib": (most - before) / 2**20}
    return {
        "samples": samples,
        "tokens": [work_of(packs, size).tokens for packs in timed],
        "padded_tokens": [padded_tokens(packs, micro_batch_size) for packs in timed],
        "matmul_flops_per_second": rate,
        "rows": {row.name: row_figures(row, rates[row.name], flops, rate, rounds) for row in rows},
        "part_flops": {part: statistics.mean(step[part] for step in watched) for part in watched[0]},
        "ratios": ratios(rates, "peer") if "peer" in names else {},
        "cpu_time_ratios": ratios(cpu, "peer") if "peer" in names else {},
        **memory,
    }


def part_flops(packs: list[Pack], size: StepSize, trained: Trained) -> dict[str, float]:
    """Operations of a step by part of the model."""
    return {part: f.total for part, f in module_flops(size.model, trained, work_of(packs, size), NUM_DRAWS).items()}


def row_figures(row: Row, rates: list[float], flops: list[float], matmul_rate: float, rounds: int) -> dict[str, Any]:
    """Figures of one row; `mfu` counts the operations of the model with its VAE, whatever a row computes beyond."""
    parts = dict(row.timeline.seconds)
    steps = 1 if torch.cuda.is_available() else rounds
    whole = sum(row.seconds) / rounds
    seconds = {part: value / steps for part, value in parts.items()}
    seconds["other"] = max(0.0, whole - sum(seconds.values()))
    return {
        "seconds": row.seconds,
        "cpu_seconds": row.cpu_seconds,
        "samples_per_second": statistics.median(rates),
        "tflops": statistics.median(f / s / 1e12 for f, s in zip(flops, row.seconds, strict=True)),
        "mfu": statistics.median(f / s / matmul_rate for f, s in zip(flops, row.seconds, strict=True)),
        "losses": row.losses,
        "part_seconds": seconds,
    }


def padded_tokens(packs: list[Pack], micro_batch_size: int) -> int:
    """Tokens that the peer computes, padding included."""
    samples = [sample for pack in packs for _, sample in pack]
    total = 0
    for has_image in (True, False):
        lengths = [len(sample.input_ids) for sample in samples if bool(sample.images) == has_image]
        for i in range(0, len(lengths), micro_batch_size):
            chunk = lengths[i : i + micro_batch_size]
            total += len(chunk) * max(chunk)
    return total


def peak_of_each(
    arguments: list[str], stages: tuple[int, ...], names: tuple[RowName, ...]
) -> dict[int, dict[str, float]]:
    """Peak resident memory of every row in a process of its own, in MiB."""
    found: dict[int, dict[str, float]] = {}
    for stage in stages:
        found[stage] = {}
        for name in names:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                extra = ["--stages", f"[{stage}]", "--rows", json_module.dumps([name]), "--rounds", "1"]
                extra += ["--memory", "false", "--json", file.name]
                subprocess.run([sys.executable, __file__, *arguments, *extra], check=True, stdout=subprocess.DEVNULL)
                figures = json_module.loads(Path(file.name).read_text())
            found[stage][name] = figures["stages"][str(stage)]["peak_memory_mib"]
    return found


def table(stages: dict[str, Any]) -> str:
    """Figures as text."""
    head = f"{'samples/s':>9} {'x peer (min-max)':>18} {'TFLOP/s':>8} {'MFU':>5} {'peak MiB':>9}"
    lines = [f"{'stage':>5}  {'row':22} {head}"]
    for stage, figures in stages.items():
        for name, row in figures["rows"].items():
            ratio = figures["ratios"].get(name)
            times = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "-"
            peak = figures.get("row_peak_memory_mib", {}).get(name)
            lines.append(
                f"{stage:>5}  {name:22} {row['samples_per_second']:9.3f} {times:>18} {row['tflops']:8.3f}"
                f" {row['mfu']:5.0%} {'-' if peak is None else f'{peak:.0f}':>9}"
            )
        rate = figures["matmul_flops_per_second"] / 1e12
        lines.append(f"{stage:>5}  {'a matrix product':22} {'-':>9} {'-':>18} {rate:8.3f} {1:5.0%} {'-':>9}")
    return "\n".join(lines)


def main(
    size: SizeName = "cpu",
    stages: tuple[int, ...] = (1, 2),
    rows: tuple[RowName, ...] = ALL_ROWS,
    rounds: int = 4,
    dtype: Literal["fp32", "bf16"] = "fp32",
    tf32: bool = False,
    num_layers: int | None = None,
    mlp_ratio: float = VICUNA_MLP_RATIO,
    micro_batch_size: int = 16,
    settings: dict[str, Any] | None = None,
    max_seconds: float = 3600.0,
    memory: bool = True,
    json: Path | None = None,
) -> None:
    """Measure and print.

    Args:
        size: `cpu`; `gpu`, Qwen2-7B with SigLIP so400m and the FLUX VAE; or `tiny`, for tests.
        stages: of training: 1 freezes the language model.
        rounds: timed steps per row, after one that warms up.
        tf32: the denoiser's products in TF32, in every row, as published; only a GPU has it.
        num_layers: of the decoder; the size's own by default.
        mlp_ratio: width of the decoder's MLP over its hidden size, at size `cpu`.
        micro_batch_size: most samples in a padded batch of the peer.
        settings: more settings of our run, e.g. `{fp8: hybrid}`.
        max_seconds: start no more rounds of a stage after this time; there is always one.
        memory: measure peak memory on a CPU, too, in a process per row; on a GPU it is always measured.
        json: also write the figures there.
    """
    chosen = step_size(size, num_layers, mlp_ratio)
    common = ["--size", size, "--dtype", dtype, "--micro_batch_size", str(micro_batch_size)]
    common += ["--mlp_ratio", str(mlp_ratio), "--settings", json_module.dumps(settings or {})]
    common += ["--num_layers", str(num_layers)] if num_layers else []
    peaks = peak_of_each(common, stages, rows) if memory and not torch.cuda.is_available() else {}
    figures = {}
    for stage in stages:
        figures[str(stage)] = run_stage(
            stage, chosen, rows, dtype, tf32, rounds, micro_batch_size, settings or {}, max_seconds
        )
        if stage in peaks:
            figures[str(stage)]["row_peak_memory_mib"] = peaks[stage]
    torch.distributed.destroy_process_group()
    print(table(figures))
    if json is not None:
        about = {
            "size": size,
            "dtype": dtype,
            "tf32": tf32,
            "mlp_ratio": mlp_ratio,
            "num_layers": num_layers,
            "settings": settings,
        }
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_module.dumps({**environment(), **about, "stages": figures}, indent=1) + "\n")


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
