"""Training steps of this project and of a plain Hugging Face implementation, on the same samples, with the same losses.

    python benchmarks/bench_step.py --json step.json                       # CPU size, both stages
    python benchmarks/bench_step.py --size gpu --dtype bf16 --stages [1]   # Qwen2-7B's widths on one GPU
    python benchmarks/bench_step.py --size gpu --dtype bf16 --settings '{fp8: hybrid}' --rows '[ours]'

The rows take turns in one process, each round in the opposite order of the round before; every round is another step.
Reading and decoding data is not part of it (bench_data.py). The ratio is that of samples per second, round by round.
Peak memory comes from processes that run one row alone: GPU allocations, or resident memory beyond what imports took.
"""

from __future__ import annotations

import json as json_module
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import psutil
import torch
from environment import environment
from peer_hf import HfRoss, make_batches
from peer_optimizer import MasterAdamW
from step_ours import OurStep, start_single_process
from step_samples import Pack, plan_steps
from step_sizes import CAPTIONS, CONVERSATIONS, VICUNA_MLP_RATIO, SizeName, StepSize, step_size
from step_timeline import Timeline, clock

from megatron_ross.config.schema import TrainabilityConfig
from megatron_ross.planner.flops import Trained, module_flops
from megatron_ross.planner.workload import Work, causal_pairs
from megatron_ross.platform import current_device

RowName = Literal["ours", "ours, cached latents", "peer"]
ALL_ROWS: tuple[RowName, ...] = ("ours", "ours, cached latents", "peer")
NUM_DRAWS, SEED, LEARNING_RATE = 4, 7, 1e-5
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference of a loss between rows. fp16 moments of a cache round, too."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Row:
    """One implementation, ready for steps, and what was measured of it."""

    name: str
    prepare: Any  # packs -> prepared
    step: Any  # prepared, packs -> (lm loss, reconstruction loss)
    timeline: Timeline = field(default_factory=Timeline)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)

    def run(self, packs: list[Pack], *, timed: bool) -> None:
        """One step on `packs`."""
        prepared = self.prepare(packs)
        begin, cpu = clock(), time.process_time()
        losses = self.step(prepared, packs)
        seconds, cpu_seconds = clock() - begin, time.process_time() - cpu
        if timed:
            self.seconds.append(seconds)
            self.cpu_seconds.append(cpu_seconds)
        self.losses.append(losses)


def peer_row(size: StepSize, stage: int, dtype: str, micro_batch_size: int) -> tuple[Row, HfRoss]:
    model = HfRoss(size.model, stage, DTYPES[dtype], current_device())
    with torch.no_grad():  # published initialisation is zero where the denoiser modulates; nothing would be compared
        for parameter in model.denoiser.parameters():
            parameter.normal_(std=0.02)
    optimizer = MasterAdamW(model.parameters(), LEARNING_RATE)

    def prepare(packs: list[Pack]) -> Any:
        samples = [pair for pack in packs for pair in pack]
        return make_batches(samples, size.model, micro_batch_size, SEED, NUM_DRAWS, current_device())

    def step(batches: Any, packs: list[Pack]) -> tuple[float, float]:
        work, sums = work_of(packs, size), torch.zeros(2, device=current_device())
        for batch in batches:
            losses = model(batch, int(work.supervised_tokens), int(work.reconstructed_images))
            total = losses[0] + losses[1]
            row.timeline.loss(total)
            total.backward()
            sums += torch.stack(losses).detach()
        optimizer.step()
        return tuple(sums.tolist())

    row = Row("peer", prepare, step)
    model.watch(row.timeline)
    row.timeline.watch_method("optimizer", optimizer, "step")
    return row, model


def our_row(name: str, size: StepSize, stage: int, dtype: str, settings: dict[str, Any]) -> tuple[Row, OurStep]:
    flat = {
        "seq_length": size.seq_length[stage],
        "packing": True,
        "global_batch_size": size.sequences,
        "micro_batch_size": 1,
        "lr": LEARNING_RATE,
        "freeze_language_model": stage == 1,
        "seed": SEED,
        "num_noise_draws": NUM_DRAWS,
        "bf16": dtype == "bf16",
        **settings,
    }
    ours = OurStep.build(size.model, flat)

    def step(batches: Any, packs: list[Pack]) -> tuple[float, float]:
        result = ours.step(batches)
        return result.lm_loss, result.recon_loss

    return Row(name, ours.batches, step), ours


def build_rows(
    names: tuple[RowName, ...], size: StepSize, stage: int, dtype: str, micro_batch_size: int, settings: dict[str, Any],
    steps: list[list[Pack]],
) -> list[Row]:  # fmt: skip
    """Rows with the same weights; without the peer, with random ones."""
    peer, model = peer_row(size, stage, dtype, micro_batch_size) if "peer" in names else (None, None)
    rows = [peer] if peer else []
    encoder = None
    for name in ("ours", "ours, cached latents"):
        if name not in names:
            continue
        is_cached = name != "ours"
        row, ours = our_row(name, size, stage, dtype, settings | ({"latent_cache": "memory"} if is_cached else {}))
        ours.finish(None if model is None else model.published_tensors())
        ours.watch(row.timeline)
        if is_cached:
            ours.cache_latents([pack for packs in steps for pack in packs], encoder)
        else:
            encoder = ours.stages[0].reconstruction.latent_encoder
        rows.append(row)
    return sorted(rows, key=lambda row: names.index(row.name))


def work_of(packs: list[Pack], size: StepSize) -> Work:
    """What a step computes, for the planner's formulas."""
    samples = [sample for pack in packs for _, sample in pack]
    images = sum(len(sample.images) for sample in samples)
    lengths = [len(sample.input_ids) for sample in samples]
    labels = sum(int((sample.labels[1:] >= 0).sum()) for sample in samples)
    return Work(sum(lengths), causal_pairs(lengths), labels, images, images)


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
    stage: int, size: StepSize, names: tuple[RowName, ...], dtype: str, rounds: int, micro_batch_size: int,
    settings: dict[str, Any], max_seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Figures of one stage of training."""
    start_single_process()
    num_steps = 1 + rounds + torch.cuda.is_available()
    texts = CAPTIONS if stage == 1 else CONVERSATIONS
    steps = plan_steps(size, size.seq_length[stage], texts, num_steps, SEED)
    before = memory_mib(peak=False)
    rows = build_rows(names, size, stage, dtype, micro_batch_size, settings, steps)
    rounds = measure(rows, steps, LOSS_TOLERANCE[dtype], max_seconds)
    timed = steps[1 : 1 + rounds]
    samples = [sum(len(pack) for pack in packs) for packs in timed]
    rates = {row.name: [n / s for n, s in zip(samples, row.seconds, strict=True)] for row in rows}
    cpu = {row.name: [n / s for n, s in zip(samples, row.cpu_seconds, strict=True)] for row in rows}
    trained = Trained.of(TrainabilityConfig(freeze_language_model=stage == 1))
    parts = [module_flops(size.model, trained, work_of(packs, size), NUM_DRAWS) for packs in timed]
    flops = [sum(part.total for part in step.values()) for step in parts]
    rate = matmul_flops_per_second(dtype)
    return {
        "samples": samples,
        "tokens": [work_of(packs, size).tokens for packs in timed],
        "padded_tokens": [padded_tokens(packs, micro_batch_size) for packs in timed],
        "matmul_flops_per_second": rate,
        "rows": {row.name: row_figures(row, rates[row.name], flops, rate, rounds) for row in rows},
        "part_flops": {part: statistics.mean(step[part].total for step in parts) for part in parts[0]},
        "ratios": ratios(rates, "peer") if "peer" in names else {},
        "cpu_time_ratios": ratios(cpu, "peer") if "peer" in names else {},
        "peak_memory_mib": memory_mib(peak=True) - before,
    }


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


def memory_mib(*, peak: bool) -> float:
    """GPU memory allocated, or resident memory of this process."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return psutil.Process().memory_info().rss / 2**20


def peak_of_each(
    arguments: list[str], stages: tuple[int, ...], names: tuple[RowName, ...]
) -> dict[int, dict[str, float]]:
    """Peak memory of every row in a process of its own, in MiB."""
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
    lines = [f"{'stage':>5}  {'row':22} {'samples/s':>9} {'x peer (min-max)':>18} {'MFU':>5} {'peak MiB':>9}"]
    for stage, figures in stages.items():
        for name, row in figures["rows"].items():
            ratio = figures["ratios"].get(name)
            times = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "-"
            peak = figures.get("row_peak_memory_mib", {}).get(name)
            lines.append(
                f"{stage:>5}  {name:22} {row['samples_per_second']:9.3f} {times:>18} {row['mfu']:5.0%}"
                f" {'-' if peak is None else f'{peak:.0f}':>9}"
            )
    return "\n".join(lines)


def main(
    size: SizeName = "cpu",
    stages: tuple[int, ...] = (1, 2),
    rows: tuple[RowName, ...] = ALL_ROWS,
    rounds: int = 4,
    dtype: Literal["fp32", "bf16"] = "fp32",
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
        num_layers: of the decoder; the size's own by default.
        mlp_ratio: width of the decoder's MLP over its hidden size, at size `cpu`.
        micro_batch_size: most samples in a padded batch of the peer.
        settings: more settings of our run, e.g. `{fp8: hybrid}`.
        max_seconds: start no more rounds of a stage after this time; there is always one.
        memory: measure peak memory, too, in a process per row.
        json: also write the figures there.
    """
    chosen = step_size(size, num_layers, mlp_ratio)
    common = ["--size", size, "--dtype", dtype, "--micro_batch_size", str(micro_batch_size)]
    common += ["--mlp_ratio", str(mlp_ratio), "--settings", json_module.dumps(settings or {})]
    common += ["--num_layers", str(num_layers)] if num_layers else []
    peaks = peak_of_each(common, stages, rows) if memory else {}
    figures = {}
    for stage in stages:
        figures[str(stage)] = run_stage(
            stage, chosen, rows, dtype, rounds, micro_batch_size, settings or {}, max_seconds
        )
        if stage in peaks:
            figures[str(stage)]["row_peak_memory_mib"] = peaks[stage]
    print(table(figures))
    if json is not None:
        about = {"size": size, "dtype": dtype, "mlp_ratio": mlp_ratio, "num_layers": num_layers, "settings": settings}
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_module.dumps({**environment(), **about, "stages": figures}, indent=1) + "\n")


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
