"""The training loop and what it needs: data, stages, optimizer, checkpoints, logs."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_ross.checkpoint.manifest import ASSETS_NAME, Manifest, iteration_dir, resolve_checkpoint
from megatron_ross.checkpoint.sharded import base_of, load_checkpoint, load_weights, save_checkpoint
from megatron_ross.compat import probe
from megatron_ross.config.cli import write_resolved
from megatron_ross.config.features import resolve_features
from megatron_ross.config.layout import StageLayout
from megatron_ross.config.schema import RunConfig
from megatron_ross.data.order import SampleOrder
from megatron_ross.parallel.grad_sync import finalize_gradients
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.parallel.param_gather import gather_now
from megatron_ross.planner.flops import step_flops
from megatron_ross.planner.workload import Work
from megatron_ross.platform import current_device
from megatron_ross.training.build import build_optimizer, build_scheduler, build_stages, wrap_ddp
from megatron_ross.training.data import build_dataset, build_loader, build_order, source_names
from megatron_ross.training.feature_table import feature_rows, feature_table
from megatron_ross.training.metrics import Interval, RunLog
from megatron_ross.training.report import parameter_counts, stage_table
from megatron_ross.training.start import is_resume, start_path
from megatron_ross.training.step import StepResult, loss_scales, step_work, train_step
from megatron_ross.training.user_buffers import start_user_buffers


class TrainingError(RuntimeError):
    """Training cannot go on; raised on every rank alike."""


class Trainer:
    """One run on one rank. `train()` runs it to its end, to a signal, or to an error that all ranks share."""

    def __init__(self, run: RunConfig, manifest: Manifest, layout: StageLayout, groups: ParallelGroups) -> None:
        self.run, self.layout, self.groups = run, layout, groups
        source = resolve_checkpoint(start_path(run))
        self.assets = source / ASSETS_NAME
        self.dataset = build_dataset(run, manifest.model.vision, self.assets)
        self.order = build_order(run, self.dataset)
        self.train_iters = num_iterations(run, self.order)
        start_user_buffers(run, manifest.model.language.hidden_size)
        self.stages = build_stages(manifest.model, run, layout, groups)
        resumes = is_resume(run)
        if not resumes:
            self.manifest = load_weights(source, self.stages)
            self.base = source
        self.chunks = wrap_ddp(self.stages, run)
        self.stages[0].config.finalize_model_grads_func = lambda *args, **kwargs: finalize_gradients(
            self.chunks, groups
        )
        self.optimizer = build_optimizer(self.chunks, run)
        self.scheduler = build_scheduler(self.optimizer, run.optimizer, self.train_iters)
        self.loader = build_loader(
            run,
            self.dataset,
            self.order,
            groups,
            letters={letter for stage in self.stages for letter in stage.spec.letters},
        )
        self.iteration = self.skipped = self.num_updates = 0
        self.learning_rate = 0.0
        self.last_losses: dict[str, float] = {}
        if resumes:
            self._resume(source)

    def _resume(self, source: Path) -> None:
        self.manifest, progress = load_checkpoint(source, self.stages, self.optimizer, self.scheduler, self.groups)
        self.base = base_of(source) or source
        self.iteration, self.skipped, self.num_updates = (
            progress["iteration"],
            progress["skipped"],
            progress["num_updates"],
        )
        self.loader.load_state_dict(progress["data"])

    def train(self) -> None:
        """Run the remaining iterations.

        Raises:
            TrainingError: too many steps with non-finite gradients.
        """
        self._announce()
        log = RunLog(self.run, self.train_iters, self.iteration) if self.groups.is_logging_rank else None
        stop = _StopSignal(self.run.training.preemption_grace_seconds)
        interval = Interval()
        saved_at = self.iteration
        while self.iteration < self.train_iters and not stop.asked():
            consumed = self.loader.consumed_samples
            result, work = self._step()
            interval.add(
                lm_loss=result.lm_loss,
                recon_loss=result.recon_loss,
                grad_norm=result.grad_norm,
                samples=self.loader.consumed_samples - consumed,
                tokens=work.tokens,
                flops=self._flops(work),
                wait=self.loader.wait_s,
            )
            if self.iteration % self.run.training.log_interval == 0 or self.iteration == self.train_iters:
                self._log(log, interval)
            if self._is_save_due():
                self.save()
                saved_at = self.iteration
        if self.run.training.save and saved_at != self.iteration:
            self.save()
        self.loader.close()
        if log is not None:
            log.close()
        if stop.signal_number is not None:
            self._print(f"stopped by {signal.Signals(stop.signal_number).name} after iteration {self.iteration}")

    def _flops(self, work: Work) -> float:
        run = self.run
        return step_flops(
            self.manifest.model,
            run.trainability,
            work,
            run.loss.num_noise_draws,
            cached_latents=bool(run.data.latent_cache),
        )

    def _step(self) -> tuple[StepResult, Work]:
        device = current_device()
        batches = [batch.to(device) for batch in self.loader.next_step()]
        self.learning_rate = self._current_learning_rate()
        scales = loss_scales(batches, self.run.loss, self.groups)
        result = train_step(self.chunks, self.optimizer, batches, scales, self.groups)
        self.scheduler.step(increment=1)
        self.iteration += 1
        self.num_updates += result.updated
        self.skipped += not result.updated
        if self.skipped > self.run.optimizer.skip_nonfinite_steps:
            raise TrainingError(
                f"iteration {self.iteration}: loss {result.loss} or gradient norm {result.grad_norm} is not finite, "
                f"{self.skipped} time(s) by now (skip_nonfinite_steps={self.run.optimizer.skip_nonfinite_steps}); "
                f"this rank's samples {[i for batch in batches for i in batch.sample_ids]}; lower lr or check the data"
            )
        return result, step_work(batches, self.groups)

    def _log(self, log: RunLog | None, interval: Interval) -> None:
        metrics = interval.take(
            iteration=self.iteration,
            consumed_samples=self.loader.consumed_samples,
            learning_rate=self.learning_rate,
            skipped=self.skipped,
            bad_samples=self.loader.bad_sample_counts,
            samples_by_source=dict(zip(source_names(self.run.data), self.loader.consumed_by_source, strict=True)),
        )
        self.last_losses = {"lm_loss": metrics.lm_loss, "recon_loss": metrics.recon_loss}
        if log is not None:
            log.write(metrics)

    def _current_learning_rate(self) -> float:
        groups = self.optimizer.param_groups
        return float(groups[0]["lr"]) if groups else 0.0

    def _is_save_due(self) -> bool:
        interval = self.run.training.save_interval
        return bool(self.run.training.save) and interval is not None and self.iteration % interval == 0

    def save(self) -> Path:
        """Write a checkpoint of this iteration."""
        gather_now(self.chunks)
        state = self.loader.state_dict()
        root = Path(self.run.training.save) / "checkpoints"
        manifest = Manifest(
            iteration=self.iteration,
            model=self.manifest.model,
            sources=self.manifest.sources,
            dtypes=self.manifest.dtypes,
            training={**self.last_losses, "settings": self.run.to_flat(), "data": state, "layout": str(self.layout)},
        )
        if self.run.training.save_trainable_only:
            manifest = replace(manifest, base=os.path.relpath(self.base, iteration_dir(root, self.iteration)))
        progress = {
            "iteration": self.iteration,
            "skipped": self.skipped,
            "num_updates": self.num_updates,
            "data": state,
        }
        directory = save_checkpoint(
            root,
            manifest,
            self.assets,
            self.stages,
            self.optimizer,
            self.scheduler,
            progress,
            self.groups,
            source=self.base if self.run.data.latent_cache else None,
        )
        self._print(f"saved {directory}")
        return directory

    def _announce(self) -> None:
        counts = parameter_counts(self.stages, self.groups)
        if self.run.training.save and dist.get_rank() == 0:
            folder = Path(self.run.training.save)
            folder.mkdir(parents=True, exist_ok=True)
            write_resolved(self.run, folder / "config.yaml")
        sequences, per_epoch = self.train_iters * self.run.data.global_batch_size, self.order.epoch_length(0)
        self._print(stage_table(self.layout, counts))
        self._print(self._features())
        self._print(
            f"{len(self.dataset):,} samples in {per_epoch:,} sequences per epoch, global batch "
            f"{self.run.data.global_batch_size}, {self.train_iters:,} steps = {sequences / per_epoch:.2f} epochs; "
            f"starting at iteration {self.iteration}"
        )

    def _features(self) -> str:
        available = probe()
        features = resolve_features(self.run, available)
        return feature_table(feature_rows(self.run, features, available, self.layout, self.groups.dp.size()))

    def _print(self, text: str) -> None:
        if self.groups.is_logging_rank:
            print(text, flush=True)


def num_iterations(run: RunConfig, order: SampleOrder) -> int:
    """`train_iters`, or enough steps to see every sample `num_epochs` times; the last may reach into the next epoch."""
    if run.training.train_iters is not None:
        return run.training.train_iters
    whole, rest = divmod(run.training.num_epochs, 1)
    sequences = sum(order.epoch_length(epoch) for epoch in range(int(whole)))
    if rest:
        sequences += math.ceil(rest * order.epoch_length(int(whole)))
    return max(1, math.ceil(sequences / run.data.global_batch_size))


class _StopSignal:
    """SIGTERM and SIGUSR1 ask for a checkpoint and an orderly end; all ranks act on it after the same step.

    A rank that cannot get there (it waits for one that died) leaves after `grace_s`.
    """

    def __init__(self, grace_s: float) -> None:
        self.signal_number: int | None = None
        self._grace_s = grace_s
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number
            signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def asked(self) -> bool:
        """True on every rank as soon as any rank was signalled. A collective call."""
        flag = torch.tensor(self.signal_number or 0, device=current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        number = int(flag)
        self.signal_number = number or None
        return number > 0
