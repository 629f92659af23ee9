"""What a run reports: one line per log interval on one rank, JSONL, TensorBoard and, when asked, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from megatron_ross.config.schema import RunConfig
from megatron_ross.config.shown import shown
from megatron_ross.data.run_files import RunFiles
from megatron_ross.text_files import replace_text
from megatron_ross.training.samples import Samples, drop_samples_after, sample_path
from megatron_ross.training.wandb_run import WandbRun

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


@dataclass(frozen=True)
class BrokenDownLosses:
    """Means by timestep range of the denoiser and by source of a blend; empty where nobody asked for them."""

    recon_loss_by_timestep: dict[str, float] = field(default_factory=dict)
    lm_loss_by_source: dict[str, float] = field(default_factory=dict)
    recon_loss_by_source: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class IntervalMetrics:
    """Means over the steps of one log interval; losses of global batches."""

    iteration: int
    consumed_samples: int
    lm_loss: float
    recon_loss: float
    grad_norm: float
    learning_rate: float
    samples_per_second: float
    tokens_per_second: float
    tflops_per_rank: float  # useful operations, from real token and image counts; frozen backward not counted
    seconds_per_iteration: float
    data_wait_seconds: float  # per iteration
    memory_gib: float  # peak of this rank: GPU allocations, or resident memory on CPU
    skipped_iterations: int
    save_stall_seconds: float  # that training stood still for saves in this interval
    bad_samples: dict[str, int]  # since the run's start, by status: bad (skipped), mismatch (masked), images_cut
    samples_by_source: dict[str, int]  # consumed since the run's start from each source of a blend
    losses: BrokenDownLosses
    empty_iterations: int = 0  # that trained nothing, since the run's start


@dataclass(frozen=True)
class ValidationMetrics:
    """One pass over the held-out samples: means over all of their supervised tokens and images."""

    iteration: int
    consumed_samples: int  # by training
    lm_loss: float
    recon_loss: float
    losses: BrokenDownLosses
    num_samples: int
    num_tokens: int  # supervised
    num_images: int  # reconstructed
    seconds: float
    bad_samples: dict[str, int]  # of this pass, by status


class Interval:
    """Accumulates steps until they are logged."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._steps: list[tuple[float, float, float]] = []
        self._samples = self._tokens = self._flops = 0.0
        self._data_wait = 0.0

    def add(
        self,
        *,
        lm_loss: float,
        recon_loss: float,
        grad_norm: float,
        samples: int,
        tokens: float,
        flops: float,
        wait: float,
    ) -> None:
        """One step of the global batch; `flops` over all ranks, `wait` for data in seconds."""
        self._steps.append((lm_loss, recon_loss, grad_norm))
        self._samples += samples
        self._tokens += tokens
        self._flops += flops
        self._data_wait += wait

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training does not count."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._begin += time.perf_counter() - begin

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    @property
    def flops(self) -> float:
        """Over all ranks and steps."""
        return self._flops

    def take(
        self,
        *,
        iteration: int,
        consumed_samples: int,
        learning_rate: float,
        skipped: int,
        save_stall: float,
        bad_samples: dict[str, int],
        samples_by_source: dict[str, int],
        losses: BrokenDownLosses,
        empty: int = 0,
    ) -> IntervalMetrics:
        """Metrics since the last call; starts a new interval."""
        seconds = time.perf_counter() - self._begin
        lm_loss, recon_loss, grad_norm = (sum(values) / len(self._steps) for values in zip(*self._steps, strict=True))
        metrics = IntervalMetrics(
            iteration=iteration,
            consumed_samples=consumed_samples,
            lm_loss=lm_loss,
            recon_loss=recon_loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            samples_per_second=self._samples / seconds,
            tokens_per_second=self._tokens / seconds,
            tflops_per_rank=self._flops / seconds / dist.get_world_size() / 1e12,
            seconds_per_iteration=seconds / len(self._steps),
            data_wait_seconds=self._data_wait / len(self._steps),
            memory_gib=_peak_memory_gib(),
            skipped_iterations=skipped,
            save_stall_seconds=save_stall,
            bad_samples=bad_samples,
            samples_by_source=samples_by_source,
            losses=losses,
            empty_iterations=empty,
        )
        self.__init__()  # type: ignore[misc]
        return metrics


def _peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class RunLog:
    """Writes metrics; made on the logging rank only.

    Args:
        files: writes the files among the destinations.
    """

    def __init__(self, run: RunConfig, files: RunFiles, train_iters: int, start_iteration: int) -> None:
        self._train_iters = train_iters
        self._folder = Path(run.training.save) if run.training.save else None
        self._files = files
        self._tensorboard = self._wandb = None
        self._coming: dict[int, Path] = {}
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, VALIDATION_FILE):
            _drop_lines_after(self._folder / name, start_iteration)
        drop_samples_after(self._folder, start_iteration)
        if run.training.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events = str(self._folder / TENSORBOARD_FOLDER)
            self._tensorboard = SummaryWriter(events, purge_step=start_iteration + 1)
        if run.training.wandb_project:
            self._wandb = WandbRun(run.training.wandb_project, run.to_flat(), self._folder)

    def write(self, metrics: IntervalMetrics) -> None:
        """One interval to every destination."""
        self._log_pictures(metrics.iteration)
        self._files.say(_line(metrics, self._train_iters))
        self._write(METRICS_FILE, "train", metrics)

    def write_validation(self, metrics: ValidationMetrics) -> None:
        """One validation to every destination."""
        self._files.say(_validation_line(metrics, self._train_iters))
        self._write(VALIDATION_FILE, "valid", metrics)

    def write_samples(self, iteration: int, samples: Samples) -> None:
        """Answers to the run's folder, TensorBoard and Weights & Biases; pictures to the latter two, once painted."""
        assert self._folder is not None, "without a folder there is nowhere to write to"
        self._log_pictures(iteration)
        self._files.say(_samples_line(iteration, self._train_iters, samples))
        answers = [asdict(answer) for answer in samples.answers]
        if answers:
            text = json.dumps({"iteration": iteration, "answers": answers}, indent=1, ensure_ascii=False)
            path = sample_path(self._folder, iteration, ".json")
            with self._files.writing(path):
                path.parent.mkdir(exist_ok=True)
                replace_text(path, text + "\n")
            self._log_answers(iteration, answers)
        if samples.picture is not None:
            self._coming[iteration] = samples.picture

    def _log_answers(self, iteration: int, answers: list[dict[str, Any]]) -> None:
        columns = list(answers[0])
        cells = [[str(answer[column]) for column in columns] for answer in answers]
        lines = [columns, ["---"] * len(columns), *cells]
        self._to_tensorboard("add_text", "samples/answers", "\n".join(map(_markdown_row, lines)), iteration)
        if self._wandb is not None:
            self._wandb.log_table("samples/answers", columns, cells, iteration)

    def _log_pictures(self, now: int) -> None:
        """Pictures of earlier iterations, painted meanwhile. Weights & Biases takes no earlier step than `now`."""
        for iteration, path in [(i, path) for i, path in self._coming.items() if path.exists()]:
            del self._coming[iteration]
            with Image.open(path) as picture:
                grid = picture.convert("RGB")
            self._to_tensorboard("add_image", "samples/pictures", np.asarray(grid), iteration, dataformats="HWC")
            if self._wandb is not None:
                self._wandb.log_image("samples/pictures", grid, now)

    def _write(self, file_name: str, prefix: str, metrics: IntervalMetrics | ValidationMetrics) -> None:
        values = _flat(metrics)
        if self._folder is not None:
            self._files.append(self._folder / file_name, json.dumps(_finite_or_text(values)) + "\n")
        scalars = {f"{prefix}/{name}": value for name, value in _scalars(values).items()}
        for name, value in scalars.items():
            self._to_tensorboard("add_scalar", name, value, metrics.iteration)
        if self._wandb is not None:
            self._wandb.log_scalars(scalars, metrics.iteration)

    def close(self, iteration: int) -> None:
        """After `Observations.finish`, so that the last pictures are there, and after this iteration."""
        self._log_pictures(iteration)
        self._to_tensorboard("close")
        if self._wandb is not None:
            self._wandb.finish()

    def _to_tensorboard(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Its writer is a thread: it may fail later than it is called, and then it fails for good."""
        if self._tensorboard is not None and self._folder is not None:
            with self._files.writing(self._folder / TENSORBOARD_FOLDER):
                getattr(self._tensorboard, method)(*args, **kwargs)


def _line(m: IntervalMetrics, train_iters: int) -> str:
    return (
        f"iteration {m.iteration:>7}/{train_iters} | consumed samples {m.consumed_samples:>9} | "
        f"lm loss {m.lm_loss:.4f} | recon loss {m.recon_loss:.4f} | grad norm {m.grad_norm:.3f} | "
        f"lr {m.learning_rate:.3e} | samples/s {m.samples_per_second:.1f} | tokens/s {m.tokens_per_second:.0f} | "
        f"TFLOP/s/rank {m.tflops_per_rank:.3g} | ms/iteration {m.seconds_per_iteration * 1e3:.0f} | "
        f"data wait ms {m.data_wait_seconds * 1e3:.0f} | memory GiB {m.memory_gib:.2f} | skipped {m.skipped_iterations}"
        + (f" | save stall ms {m.save_stall_seconds * 1e3:.0f}" if m.save_stall_seconds else "")
        + (f" | empty {m.empty_iterations}" if m.empty_iterations else "")
        + _bad_samples(m.bad_samples)
    )


def _validation_line(m: ValidationMetrics, train_iters: int) -> str:
    return (
        f"iteration {m.iteration:>7}/{train_iters} | validation on {m.num_samples} samples | "
        f"lm loss {m.lm_loss:.4f} | recon loss {m.recon_loss:.4f} | tokens {m.num_tokens} | images {m.num_images} | "
        f"seconds {m.seconds:.2f}" + _bad_samples(m.bad_samples)
    )


def _samples_line(iteration: int, train_iters: int, samples: Samples) -> str:
    pictures = "" if samples.picture is None else f" | pictures: {samples.picture}"
    answers = f"{len(samples.answers)} answers | seconds {samples.seconds:.2f}"
    return f"iteration {iteration:>7}/{train_iters} | {answers}{pictures}"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


def _bad_samples(counts: dict[str, int]) -> str:
    return "".join(f" | {name} samples {count}" for name, count in sorted(counts.items()))


def _flat(metrics: IntervalMetrics | ValidationMetrics) -> dict[str, Any]:
    """A dictionary with the parts of `losses` beside the other values."""
    values = asdict(metrics)
    losses = values.pop("losses")
    return values | losses


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """Numbers by name; those of a dictionary as `name/key`."""
    scalars: dict[str, float] = {}
    for name, value in values.items():
        scalars |= {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return scalars


def _finite_or_text(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""

    def text(value: Any) -> Any:
        if isinstance(value, dict):
            return _finite_or_text(value)
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {name: text(value) for name, value in values.items()}


def _drop_lines_after(path: Path, iteration: int) -> None:
    """A resumed run rewrites what came after its checkpoint, so every iteration stands in the file once."""
    if path.exists():
        replace_text(path, "".join(line + "\n" for line in _lines_until(path, iteration)))


def _lines_until(path: Path, iteration: int) -> Iterator[str]:
    """Lines up to this iteration. The last line of a run that was killed may be a part of one; it is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            is_kept = json.loads(line)["iteration"] <= iteration
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                return
            raise ValueError(
                f"{path}, line {number}: {shown(line)} is no line of a log; remove it, then resume"
            ) from None
        if is_kept:
            yield line
