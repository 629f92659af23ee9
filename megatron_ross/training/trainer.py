"""The training loop and what it needs: data, stages, optimizer, checkpoints, logs."""

from __future__ import annotations

import signal
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron_ross.checkpoint.agreement import agree_on_checkpoint
from megatron_ross.checkpoint.loading import base_of, load_checkpoint, load_weights, verify_checkpoint
from megatron_ross.checkpoint.manifest import ASSETS_NAME, Manifest
from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.checkpoint.state import training_state
from megatron_ross.checkpoint.vae import load_latent_encoder
from megatron_ross.compat import probe
from megatron_ross.config.cli import write_resolved
from megatron_ross.config.features import resolve_features
from megatron_ross.config.layout import StageLayout
from megatron_ross.config.schema import RunConfig
from megatron_ross.data.batch import RossMicrobatch
from megatron_ross.data.run_files import RunFiles
from megatron_ross.parallel.grad_sync import finalize_gradients
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.parallel.param_gather import gather_now
from megatron_ross.planner.flops import step_flops
from megatron_ross.planner.workload import Work
from megatron_ross.platform import current_device
from megatron_ross.training.build import build_optimizer, build_scheduler, build_stages, wrap_ddp
from megatron_ross.training.checkpoints import RunCheckpoints, Snapshot, trained_model, training_record
from megatron_ross.training.data import agree_on_data, build_dataset, build_loader, build_order, source_names
from megatron_ross.training.empty_steps import EmptySteps
from megatron_ross.training.errors import TrainingError
from megatron_ross.training.feature_table import feature_rows, feature_table
from megatron_ross.training.metrics import Interval, RunLog
from megatron_ross.training.nonfinite import nonfinite_microbatches, samples_of, write_nonfinite
from megatron_ross.training.observations import Observations
from megatron_ross.training.report import parameter_counts, stage_table
from megatron_ross.training.rerun import start_rerun
from megatron_ross.training.resumed import changed_settings, group_sizes, plan_start, record_of
from megatron_ross.training.signals import StopSignal
from megatron_ross.training.spikes import SpikeDetector
from megatron_ross.training.start import Start, with_image_conversion
from megatron_ross.training.step import StepResult, loss_scales, step_work, train_step
from megatron_ross.training.straggler import StragglerReport
from megatron_ross.training.user_buffers import start_user_buffers
from megatron_ross.training.watchdog import Watchdog


class Trainer:
    """One run on one rank. `train()` runs it to its end, to a signal, or to an error that all ranks share."""

    def __init__(self, run: RunConfig, start: Start, layout: StageLayout, groups: ParallelGroups) -> None:
        run = with_image_conversion(run, start)
        self.run, self.layout, self.groups = run, layout, groups
        self.folder = Path(run.training.save) if run.training.save else None
        self.files = RunFiles.of(run)
        self.watchdog = Watchdog(60 * run.training.hang_timeout_minutes, self.folder)
        self.watchdog.beat("start")
        agree_on_checkpoint(start.directory, f"{start.manifest.digest}, resumed: {start.resumes}")
        source, manifest = start.directory, start.manifest
        if run.training.verify_checkpoint:
            verify_checkpoint(source)
        self.assets = source / ASSETS_NAME
        self.dataset = build_dataset(run, manifest.model.vision, self.assets)
        agree_on_data(self.dataset)
        self.group_sizes = group_sizes(run, start)
        self.order = build_order(run, self.dataset, beat=self.watchdog.beat, group_sizes=self.group_sizes)
        self.plan = plan_start(run, start, self.order)
        self.train_iters = self.plan.train_iters
        start_user_buffers(run, manifest.model.language.hidden_size)
        self.stages = build_stages(manifest.model, run, layout, groups)
        if not start.resumes:
            self.manifest = load_weights(source, self.stages)
            self.base = source
        self.chunks = wrap_ddp(self.stages, run)
        self.stages[0].config.finalize_model_grads_func = lambda *args, **kwargs: finalize_gradients(
            self.chunks, groups
        )
        self.optimizer = build_optimizer(self.chunks, run)
        self.scheduler = build_scheduler(
            self.optimizer, run.optimizer, self.plan.schedule, self.plan.progress.sequences
        )
        self.loader = build_loader(
            run,
            self.dataset,
            self.order,
            groups,
            letters={letter for stage in self.stages for letter in stage.spec.letters},
        )
        self.observations = Observations(
            run,
            manifest.model,
            self.assets,
            self.dataset,
            self.chunks,
            groups,
            layout.pp_rank_of("D"),
            lambda: load_latent_encoder(open_checkpoint(self._whole_checkpoint())),
            self.watchdog.beat,
        )
        self.checkpoints = RunCheckpoints(run, self.assets, self._print) if self.folder else None
        self.rerun = start_rerun(run.training.rerun_mode, self.folder)
        self.straggler = StragglerReport(run.training.log_straggler)
        self.spikes = SpikeDetector(run.training.loss_spike_factor)
        self.empty = EmptySteps.of(run, self.order.epoch_length(0), self.train_iters)
        self.iteration = self.skipped = self.num_updates = 0
        self.learning_rate = 0.0
        self.last_losses: dict[str, float] = {}
        self.changes = changed_settings(run, start) if start.resumes else []
        if start.resumes:
            self._resume(source)

    def _resume(self, source: Path) -> None:
        self.manifest, progress = load_checkpoint(source, self.stages, self.optimizer, self.groups)
        self.base = base_of(source) or source
        self.iteration, self.skipped, self.num_updates = (
            progress["iteration"],
            progress["skipped"],
            progress["num_updates"],
        )
        self.loader.load_state_dict(progress["data"])
        self.empty.total = progress.get("empty", 0)

    def train(self) -> None:
        """Run the remaining iterations.

        Raises:
            TrainingError: too many steps with non-finite gradients, or that train nothing.
            CheckpointError: a checkpoint cannot be written.
        """
        self._announce()
        log = RunLog(self.run, self.files, self.train_iters, self.iteration) if self.groups.is_logging_rank else None
        stop = StopSignal(self.run.training.preemption_grace_seconds)
        interval = Interval()
        saved_at, stopped_by = self.iteration, 0
        while self.iteration < self.train_iters and not stopped_by:
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
            stopped_by = self._agree(stop)
            if not stopped_by and self.observations.is_due(self.iteration, self.train_iters):
                with interval.paused():
                    self.observations.look(
                        self.iteration,
                        self.train_iters,
                        self.loader.consumed_samples,
                        log,
                        lambda: bool(self._agree(stop)),
                    )
                stopped_by = self._agree(stop)
            if self._is_save_due():
                self.save(is_last=bool(stopped_by) or self.iteration == self.train_iters)
                saved_at = self.iteration
            if self.iteration % self.run.training.log_interval == 0 or self.iteration == self.train_iters:
                self._log(log, interval)
        if self.checkpoints is not None:
            if saved_at != self.iteration:
                self.save(is_last=True)
            self.checkpoints.finish(is_last=True)
        stop.cancel()
        self.observations.finish()
        self._close(log)
        if stopped_by:
            self._print(f"stopped by {signal.Signals(stopped_by).name} after iteration {self.iteration}")

    def _agree(self, stop: StopSignal) -> int:
        """The signal that any rank got, or 0; ends a pending save when no rank is writing. A collective call."""
        is_writing = self.checkpoints is not None and self.checkpoints.is_writing
        flags = torch.tensor([stop.number, int(is_writing)], device=current_device())
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        number, any_writing = flags.tolist()
        if self.checkpoints is not None and not any_writing:
            self.checkpoints.finish()
        return number

    def _close(self, log: RunLog | None) -> None:
        self.watchdog.stop()
        self.loader.close()
        self.observations.close()
        if self.checkpoints is not None:
            self.checkpoints.close()
        if log is not None:
            log.close(self.iteration)

    def _flops(self, work: Work) -> float:
        run = self.run
        return step_flops(
            self.manifest.model,
            run.trainability,
            work,
            run.loss.denoiser_passes,
            cached_latents=bool(run.data.latent_cache),
        )

    def _step(self) -> tuple[StepResult, Work]:
        self.watchdog.beat(f"iteration {self.iteration + 1}")
        device = current_device()
        batches = [batch.to(device) for batch in self.loader.next_step()]
        self.learning_rate = self._current_learning_rate()
        scales = loss_scales(batches, self.run.loss, self.groups)
        with self.straggler.step():
            result = train_step(self.chunks, self.optimizer, batches, scales, self.groups, self.rerun)
        self.scheduler.step(increment=self.run.data.global_batch_size)
        self.iteration += 1
        self.num_updates += result.updated
        if not result.updated:
            self._skip(result, batches)
        elif (median := self.spikes.look(result.loss)) is not None:
            self._print(f"warning: iteration {self.iteration}: loss {result.loss:.4g}, {median:.4g} before: a spike")
        work = step_work(batches, self.groups)
        self._look_for_work(work, result.grad_norm)
        return result, work

    def _look_for_work(self, work: Work, grad_norm: float) -> None:
        """Raises TrainingError after too many steps that trained nothing."""
        try:
            self.empty.look(self.iteration, work, grad_norm)
        except TrainingError:
            if self.checkpoints is not None:
                self.checkpoints.finish()
            raise

    def _skip(self, result: StepResult, batches: list[RossMicrobatch]) -> None:
        """Write down which samples a step without update had, and stop if there were too many such steps."""
        self.skipped += 1
        found = nonfinite_microbatches(self.stages, batches)
        text = f"iteration {self.iteration}: loss {result.loss} or gradient norm {result.grad_norm} is not finite"
        if self.folder is not None and self.groups.is_logging_rank:
            values = {name: str(getattr(result, name)) for name in ("lm_loss", "recon_loss", "grad_norm")}
            write_nonfinite(self.files, self.folder, {"iteration": self.iteration, **values, "microbatches": found})
        self._print(f"warning: {text}; nothing is updated; samples {samples_of(found)}")
        if self.skipped > self.run.optimizer.skip_nonfinite_steps:
            if self.checkpoints is not None:
                self.checkpoints.finish()
            raise TrainingError(
                f"{text}, {self.skipped} time(s) by now "
                f"(skip_nonfinite_steps={self.run.optimizer.skip_nonfinite_steps}); samples {samples_of(found)}; "
                "lower lr or check the data"
            )

    def _log(self, log: RunLog | None, interval: Interval) -> None:
        self.straggler.report(interval.flops, interval.num_steps)
        metrics = interval.take(
            iteration=self.iteration,
            consumed_samples=self.loader.consumed_samples,
            learning_rate=self.learning_rate,
            skipped=self.skipped,
            empty=self.empty.total,
            save_stall=0.0 if self.checkpoints is None else self.checkpoints.take_stall(),
            bad_samples=self.loader.bad_sample_counts,
            samples_by_source=dict(zip(source_names(self.run.data), self.loader.consumed_by_source, strict=True)),
            losses=self.observations.take_training_losses(),
        )
        self.last_losses = {"lm_loss": metrics.lm_loss, "recon_loss": metrics.recon_loss}
        if log is not None:
            log.write(metrics)

    def _current_learning_rate(self) -> float:
        groups = self.optimizer.param_groups
        return float(groups[0]["lr"]) if groups else 0.0

    def _is_save_due(self) -> bool:
        interval = self.run.training.save_interval
        return self.checkpoints is not None and interval is not None and self.iteration % interval == 0

    def save(self, *, is_last: bool = False) -> None:
        """Write a checkpoint of this iteration, or begin to; see `RunCheckpoints.save`."""
        assert self.checkpoints is not None, "the run has no folder to save to"
        self.watchdog.beat(f"save of iteration {self.iteration}")
        gather_now(self.chunks)
        data = self.loader.state_dict()
        trainable_only = self.run.training.save_trainable_only
        manifest = Manifest(
            iteration=self.iteration,
            model=trained_model(self.manifest.model, self.run),
            sources=self.manifest.sources,
            dtypes=self.manifest.dtypes,
            training=training_record(
                self.last_losses, self.run, data, str(self.layout), record_of(self.plan, self.group_sizes)
            ),
            base=self.checkpoints.relative_base(self.base, self.iteration) if trainable_only else None,
        )
        progress = {
            "iteration": self.iteration,
            "skipped": self.skipped,
            "num_updates": self.num_updates,
            "empty": self.empty.total,
            "data": data,
        }

        def state() -> ShardedStateDict:
            return training_state(
                self.stages,
                self.optimizer,
                progress,
                self.groups,
                trainable_only=trainable_only,
                source=self._whole_checkpoint() if self.run.data.latent_cache else None,
            )

        self.checkpoints.save(Snapshot(manifest, state), is_last=is_last)

    def _whole_checkpoint(self) -> Path:
        """One with the parts that this run does not hold. The one it resumed from may have been removed since."""
        newest = None if self.checkpoints is None else self.checkpoints.newest
        return self.base if newest is None or self.run.training.save_trainable_only else newest

    def _announce(self) -> None:
        counts = parameter_counts(self.stages, self.groups)
        if self.folder is not None and dist.get_rank() == 0:
            write_resolved(self.run, self.folder / "config.yaml")
        sequences, per_epoch = self.plan.num_sequences, self.order.epoch_length(0)
        self._print(stage_table(self.layout, counts))
        self._print(self._features())
        self._print(
            f"{len(self.dataset):,} samples in {per_epoch:,} sequences per epoch, global batch "
            f"{self.run.data.global_batch_size}, {self.train_iters:,} steps = {sequences / per_epoch:.2f} epochs; "
            f"starting at iteration {self.iteration}"
        )
        if self.changes:
            self._print(f"settings that differ from the checkpoint's: {'; '.join(self.changes)}")
        if self.plan.progress.continued_at is not None:
            optimizer = self.run.optimizer
            how = f"lr_continue={optimizer.lr_continue}" if optimizer.lr_continue else "lr_decay_style=constant"
            self._print(
                f"the run goes on after its end at iteration {self.plan.progress.continued_at}: learning rate by {how}"
            )

    def _features(self) -> str:
        available = probe()
        features = resolve_features(self.run, available)
        return feature_table(feature_rows(self.run, features, available, self.layout, self.groups.dp.size()))

    def _print(self, text: str) -> None:
        if self.groups.is_logging_rank:
            self.files.say(text)
