"""What a run reports: one line per log interval on one rank, JSONL, TensorBoard and, when asked, Weights & Biases."""

from __future__ import annotations

import json
import math
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ross.config.schema import RunConfig


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
        )
        self.__init__()  # type: ignore[misc]
        return metrics


def _peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class RunLog:
    """Writes metrics; made on the logging rank only."""

    def __init__(self, run: RunConfig, train_iters: int, start_iteration: int) -> None:
        self._train_iters = train_iters
        self._folder = Path(run.training.save) if run.training.save else None
        self._jsonl = self._tensorboard = self._wandb = None
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "metrics.jsonl"
        _drop_lines_after(path, start_iteration)
        self._jsonl = path.open("a")
        if run.training.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start_iteration + 1)
        if run.training.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=run.training.wandb_project, config=run.to_flat(), dir=str(self._folder), resume="allow"
            )

    def write(self, metrics: IntervalMetrics) -> None:
        """One interval to every destination."""
        print(_line(metrics, self._train_iters), flush=True)
        if self._jsonl is not None:
            self._jsonl.write(json.dumps(_finite_or_text(asdict(metrics))) + "\n")
            self._jsonl.flush()
        if self._tensorboard is not None:
            for name, value in _scalars(metrics).items():
                self._tensorboard.add_scalar(f"train/{name}", value, metrics.iteration)
        if self._wandb is not None:
            self._wandb.log({f"train/{k}": v for k, v in _scalars(metrics).items()}, step=metrics.iteration)

    def close(self) -> None:
        for sink, method in ((self._jsonl, "close"), (self._tensorboard, "close"), (self._wandb, "finish")):
            if sink is not None:
                getattr(sink, method)()


def _line(m: IntervalMetrics, train_iters: int) -> str:
    return (
        f"iteration {m.iteration:>7}/{train_iters} | consumed samples {m.consumed_samples:>9} | "
        f"lm loss {m.lm_loss:.4f} | recon loss {m.recon_loss:.4f} | grad norm {m.grad_norm:.3f} | "
        f"lr {m.learning_rate:.3e} | samples/s {m.samples_per_second:.1f} | tokens/s {m.tokens_per_second:.0f} | "
        f"TFLOP/s/rank {m.tflops_per_rank:.3g} | ms/iteration {m.seconds_per_iteration * 1e3:.0f} | "
        f"data wait ms {m.data_wait_seconds * 1e3:.0f} | memory GiB {m.memory_gib:.2f} | skipped {m.skipped_iterations}"
        + (f" | save stall ms {m.save_stall_seconds * 1e3:.0f}" if m.save_stall_seconds else "")
        + "".join(f" | {name} samples {count}" for name, count in sorted(m.bad_samples.items()))
    )


def _scalars(metrics: IntervalMetrics) -> dict[str, float]:
    """Numbers by name; those of a dictionary as `name/key`."""
    scalars: dict[str, float] = {}
    for name, value in asdict(metrics).items():
        scalars |= {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return scalars


def _finite_or_text(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _drop_lines_after(path: Path, iteration: int) -> None:
    """A resumed run rewrites what came after its checkpoint, so every iteration stands in the file once."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["iteration"] <= iteration]
    path.write_text("".join(line + "\n" for line in kept))
