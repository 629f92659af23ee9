"""Fused kernels on a GPU: time, bytes moved, fraction of copy bandwidth, and ratios to eager PyTorch and torch.compile.

    python benchmarks/bench_kernels.py --json kernels.json
    python benchmarks/bench_kernels.py --dry-run          # tiny, in Triton's interpreter, on CPU

Bytes are those that have to be moved: every input read once, every output written once. Copy bandwidth is measured in
the same run with `Tensor.copy_` of a large buffer (bytes read plus bytes written). "eager" and "compile" run the
PyTorch definition. Every kernel is compared with its definition before it is timed.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
from environment import environment
from jsonargparse.typing import PositiveInt
from torch import Tensor

LATENT_CHANNELS, NUM_DRAWS, NUM_TIMESTEPS, SEED = 16, 4, 1000, 17
SHIFT, SCALING = 0.1159, 0.3611
FLUSH_BYTES = 2**28  # more than any L2 cache holds
HEAD_START_CYCLES = 4_000_000  # about 2 ms, in which the host queues everything that is timed
NORM_EPS = 1e-6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """n images of g x g patches, denoiser width D."""

    num_images: int
    grid_size: int
    width: int


@dataclass(frozen=True)
class Case:
    """One operation: `run(use_triton)` does it once and returns what to compare."""

    name: str
    dtype: str
    num_bytes: int
    run: Callable[[bool], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Result:
    """Medians of one case; ratios above 1 mean that the kernel is faster."""

    name: str
    dtype: str
    megabytes: float
    kernel_us: float
    gigabytes_per_second: float
    fraction_of_copy: float
    eager_us: float | None
    ratio_to_eager: float | None
    compile_us: float | None
    ratio_to_compile: float | None


def noise_cases(size: Size, dtype: str, device: str) -> list[Case]:
    """Noising (keyed and explicit noise), scoring, and scoring with its backward pass."""
    from ross_kernels import noise_mse
    from ross_kernels.noise_mse import reference

    n, g, element = size.num_images, size.grid_size, DTYPES[dtype].itemsize
    mean, logvar = torch.randn(2, n, LATENT_CHANNELS, 2 * g, 2 * g, device=device).half()
    keys = noise_mse.NoiseKeys(SEED, torch.arange(3 * n, device=device).view(n, 3), NUM_DRAWS)
    given = reference.draw(keys, num_timesteps=NUM_TIMESTEPS, latent_channels=LATENT_CHANNELS, grid_size=g)
    angle = torch.linspace(0, 1.5, NUM_TIMESTEPS, device=device)
    schedule = noise_mse.NoiseSchedule(angle.cos(), angle.sin())
    predicted = torch.randn(NUM_DRAWS, n, g * g, 4 * LATENT_CHANNELS, device=device).to(DTYPES[dtype])
    rows = mean.numel() * NUM_DRAWS

    def noising(noise: noise_mse.Noise) -> Callable[[bool], tuple[Tensor, ...]]:
        return lambda use_triton: noise_mse.noise_latents(
            mean, logvar, noise, schedule, shift=SHIFT, scaling=SCALING, dtype=DTYPES[dtype], use_triton=use_triton
        )

    def scoring(use_triton: bool) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return noise_mse.noise_mse(predicted, keys, use_triton=use_triton)

    def scoring_and_backward(use_triton: bool) -> tuple[Tensor, ...]:
        leaf = predicted.detach().requires_grad_()
        sums, _ = noise_mse.noise_mse(leaf, keys, use_triton=use_triton)
        return torch.autograd.grad(sums.sum(), leaf)

    moments = 2 * mean.numel() * mean.element_size()
    return [
        Case("noise, keyed", dtype, moments + rows * element, noising(keys)),
        Case("noise, explicit", dtype, moments + rows * element + 4 * (rows + mean.numel()), noising(given)),
        Case("score", dtype, rows * element, scoring),
        Case("score + backward", dtype, 3 * rows * element, scoring_and_backward),
    ]


def adaln_cases(size: Size, dtype: str, device: str) -> list[Case]:
    """Forward, and forward with backward, of both operations; shift, scale and gate are slices of [..., 6 D]."""
    from ross_kernels import adaln

    shape = (NUM_DRAWS * size.num_images, size.grid_size**2, size.width)
    x, h, grad = torch.randn(3, *shape, device=device).to(DTYPES[dtype])
    modulation = torch.randn(*shape[:-1], 6 * size.width, device=device).to(DTYPES[dtype])
    shift, scale, gate = modulation.chunk(6, dim=-1)[:3]
    one = x.numel() * x.element_size()

    def modulate(use_triton: bool, *inputs: Tensor) -> Tensor:
        return adaln.layernorm_modulate(*inputs, eps=NORM_EPS, use_triton=use_triton)

    def gated(use_triton: bool, *inputs: Tensor) -> Tensor:
        return adaln.gated_residual(*inputs, use_triton=use_triton)

    def forward(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[bool], tuple[Tensor, ...]]:
        return lambda use_triton: (function(use_triton, *inputs),)

    def both(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[bool], tuple[Tensor, ...]]:
        def run(use_triton: bool) -> tuple[Tensor, ...]:
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            return torch.autograd.grad(function(use_triton, *leaves), leaves, grad)

        return run

    return [
        Case("modulate", dtype, 4 * one, forward(modulate, x, shift, scale)),
        Case("modulate + backward", dtype, 9 * one, both(modulate, x, shift, scale)),
        Case("gate", dtype, 4 * one, forward(gated, x, gate, h)),
        Case("gate + backward", dtype, 9 * one, both(gated, x, gate, h)),
    ]


def assert_same(case: Case) -> None:
    """Kernel and definition agree; no figure is given for a wrong kernel."""
    tolerance = 5e-2 if case.dtype == "bf16" else 1e-4
    for got, expected in zip(case.run(True), case.run(False), strict=True):
        scale = float(expected.float().abs().max())
        if float((got.float() - expected.float()).abs().max()) > tolerance * scale:
            raise RuntimeError(f"{case.name} ({case.dtype}): the kernel differs from its definition; not timed")


def time_on_gpu(run: Callable[[], Any], warmup: int = 3, repetitions: int = 20) -> float:
    """Median seconds with a cold L2 cache. The GPU sleeps first, so that the host's launch cost is not timed."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def time_once(run: Callable[[], Any]) -> float:
    """Seconds of one run on CPU; for the dry run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def copy_bandwidth(timer: Callable[[Callable[[], Any]], float], num_bytes: int, device: str) -> float:
    """Bytes per second, read plus written, of a device-to-device copy; the best of three."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return max(2 * num_bytes / timer(lambda: target.copy_(source)) for _ in range(3))


def measure(case: Case, bandwidth: float, timer: Callable[[Callable[[], Any]], float], backend: str) -> Result:
    """Kernel, definition and compiled definition of one case; the last two are None if they cannot run."""
    assert_same(case)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: case.run(False), backend=backend)
    kernel_s = timer(lambda: case.run(True))
    eager_s = seconds_or_none(timer, lambda: case.run(False), f"{case.name}: eager")
    compile_s = seconds_or_none(timer, compiled, f"{case.name}: torch.compile")
    rate = case.num_bytes / kernel_s
    return Result(
        name=case.name,
        dtype=case.dtype,
        megabytes=case.num_bytes / 1e6,
        kernel_us=kernel_s * 1e6,
        gigabytes_per_second=rate / 1e9,
        fraction_of_copy=rate / bandwidth,
        eager_us=eager_s and eager_s * 1e6,
        ratio_to_eager=eager_s and eager_s / kernel_s,
        compile_us=compile_s and compile_s * 1e6,
        ratio_to_compile=compile_s and compile_s / kernel_s,
    )


def seconds_or_none(timer: Callable[[Callable[[], Any]], float], run: Callable[[], Any], what: str) -> float | None:
    """Time of something that is only compared with: if it fails, that is printed and the others go on."""
    try:
        return timer(run)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        print(f"{what} failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def table(results: list[Result]) -> str:
    """Results as text."""
    lines = ["kernel               dtype      MB   kernel us    GB/s  of copy  eager x  compile x"]
    for r in results:
        eager, compiled = (f"{v:.2f}" if v else "-" for v in (r.ratio_to_eager, r.ratio_to_compile))
        lines.append(
            f"{r.name:<20} {r.dtype:<5} {r.megabytes:>7.1f} {r.kernel_us:>11.1f} {r.gigabytes_per_second:>7.0f}"
            f" {r.fraction_of_copy:>7.0%} {eager:>8} {compiled:>10}"
        )
    shares = [r.fraction_of_copy for r in results]
    return "\n".join([*lines, f"median fraction of copy bandwidth: {statistics.median(shares):.0%}"])


def parser() -> jsonargparse.ArgumentParser:
    """Command line."""
    arguments = jsonargparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--num-images", type=PositiveInt, default=32, help="images per call, with four draws each")
    arguments.add_argument("--grid-size", type=PositiveInt, default=27, help="patches per side: SigLIP 27, CLIP 24")
    arguments.add_argument("--width", type=PositiveInt, default=1024, help="of the denoiser")
    arguments.add_argument("--dtypes", type=list[Literal["bf16", "fp32"]], default=["bf16", "fp32"])
    arguments.add_argument("--json", type=Path | None, default=None, help="write the results to this file")
    arguments.add_argument(
        "--dry-run", action="store_true", help="tiny sizes in Triton's interpreter on CPU; the figures mean nothing"
    )
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 without a GPU."""
    options = parser().parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "error: kernel speed can only be measured on a CUDA GPU, and torch sees none; "
            "--dry-run tries the benchmark itself in Triton's interpreter",
            file=sys.stderr,
        )
        return 2
    device, size, timer, backend = (
        "cuda",
        Size(options.num_images, options.grid_size, options.width),
        time_on_gpu,
        "inductor",
    )
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which nothing above does
        device, size, timer, backend = "cpu", Size(1, 2, 8), time_once, "eager"
    bandwidth = copy_bandwidth(timer, 2**20 if options.dry_run else 2**30, device)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s", flush=True)
    about = {
        **environment(),
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "size": asdict(size),
        "dry_run": options.dry_run,
    }
    results: list[Result] = []
    for dtype in options.dtypes:
        for case in (*noise_cases(size, dtype, device), *adaln_cases(size, dtype, device)):
            results.append(measure(case, bandwidth, timer, backend))
            if options.json is not None:  # after each case: whatever ends this early, what was measured is there
                write_json(options.json, about, results)
    print(table(results))
    return 0


def write_json(path: Path, about: dict[str, Any], results: list[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
