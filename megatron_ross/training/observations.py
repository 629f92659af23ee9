"""What is looked at while a run trains (docs/observing.md): losses taken apart, validation, pictures and answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel

from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.timesteps import NUM_TRAIN_TIMESTEPS
from megatron_ross.data.tokenizer import load_tokenizer
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.models.loss_breakdown import LossBreakdown, Mean, MeanLosses
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.platform import current_device
from megatron_ross.training.data import (
    TrainingSet,
    agree_on_data,
    build_loader,
    build_valid_dataset,
    build_valid_order,
    source_ends,
    source_names,
    valid_samples,
)
from megatron_ross.training.metrics import BrokenDownLosses, RunLog, ValidationMetrics
from megatron_ross.training.samples import SampleMaker
from megatron_ross.training.validation import Validation, ValidationResult


class Observations:
    """Of one run on one rank. All methods but `close` are collective.

    Args:
        dataset: the training set.
        assets: folder of the tokenizer.
        denoiser_pp_rank: pipeline rank with the denoiser; None: plain LLaVA.
        encoder: loads the VAE for ranks that have none at hand.
        beat: tells the watchdog that something goes on.
    """

    def __init__(
        self,
        run: RunConfig,
        model: RossModelConfig,
        assets: Path,
        dataset: TrainingSet,
        chunks: list[DistributedDataParallel],
        groups: ParallelGroups,
        denoiser_pp_rank: int | None,
        encoder: Callable[[], LatentEncoder],
        beat: Callable[[str], None],
    ) -> None:
        self._run, self._groups, self._beat = run, groups, beat
        settings = run.observation
        has_timesteps = model.denoiser is not None and run.loss.recon_objective == "denoise"
        self._num_buckets = settings.log_timestep_buckets if has_timesteps else 0
        ends = source_ends(dataset) if settings.log_source_losses else []
        self._names = source_names(run.data) if ends else []
        self._training: LossBreakdown | None = None
        self._validation: Validation | None = None
        self._samples: SampleMaker | None = None
        if self._num_buckets or ends:
            self._training = LossBreakdown(current_device(), num_buckets=self._num_buckets, source_ends=ends)
            for chunk in chunks:
                chunk.module.breakdown = self._training
        if settings.eval_interval is None and settings.sample_interval is None:
            return
        valid = build_valid_dataset(run, model.vision, assets)
        if valid is not None:
            agree_on_data(valid)
        held_out = dataset if valid is None else valid
        if settings.eval_interval is not None:
            order = build_valid_order(run, held_out, beat)
            letters = {letter for chunk in chunks for letter in chunk.module.spec.letters}
            loader = build_loader(run, held_out, order, groups, letters=letters)
            breakdown = LossBreakdown(
                current_device(), num_buckets=self._num_buckets, source_ends=ends if valid is None else []
            )
            self._validation = Validation(run, chunks, groups, loader, order, breakdown, beat)
        if settings.sample_interval is not None:
            tokenizer = load_tokenizer(assets)
            ids = valid_samples(run, held_out).epoch_ids(0).tolist()
            self._samples = SampleMaker(run, model, chunks, groups, held_out, ids, tokenizer, encoder, denoiser_pp_rank)

    def is_due(self, iteration: int, train_iters: int) -> bool:
        """Whether `look` has something to do after this iteration."""
        intervals = (self._run.observation.eval_interval, self._run.observation.sample_interval)
        return any(_is_due(interval, iteration, train_iters) for interval in intervals)

    def look(
        self,
        iteration: int,
        train_iters: int,
        consumed_samples: int,
        log: RunLog | None,
        should_stop: Callable[[], bool],
    ) -> None:
        """Validate, paint and answer, as far as it is due, and write down what was found.

        Args:
            log: on the logging rank.
            should_stop: a collective that says whether to leave out what has not begun; see `Validation.run`.
        """
        settings = self._run.observation
        if self._validation is not None and _is_due(settings.eval_interval, iteration, train_iters):
            result = self._validation.run(should_stop)
            if result is not None and log is not None:
                log.write_validation(self._metrics(iteration, consumed_samples, result))
        is_due = _is_due(settings.sample_interval, iteration, train_iters)
        if self._samples is not None and is_due and not should_stop():
            self._beat(f"samples of iteration {iteration}")
            samples = self._samples.run(iteration)
            if samples is not None and log is not None:
                log.write_samples(iteration, samples)

    def take_training_losses(self) -> BrokenDownLosses:
        """Means since the last call. One small reduction, at the log's interval."""
        return BrokenDownLosses() if self._training is None else self._broken_down(self._training.take(self._groups))

    def finish(self) -> None:
        """Wait for what is made beside training."""
        if self._samples is not None:
            self._beat("last pictures")
            self._samples.finish()

    def close(self) -> None:
        """Stop background threads."""
        if self._validation is not None:
            self._validation.close()

    def _metrics(self, iteration: int, consumed_samples: int, result: ValidationResult) -> ValidationMetrics:
        lm, recon = result.losses.lm, result.losses.recon
        return ValidationMetrics(
            iteration=iteration,
            consumed_samples=consumed_samples,
            lm_loss=lm.value * self._run.loss.lm_loss_weight,
            recon_loss=recon.value * self._run.loss.recon_loss_weight,
            losses=self._broken_down(result.losses),
            num_samples=result.num_samples,
            num_tokens=lm.count,
            num_images=recon.count,
            seconds=result.seconds,
            bad_samples=result.bad_samples,
        )

    def _broken_down(self, losses: MeanLosses) -> BrokenDownLosses:
        """By name, without buckets and sources of which nothing came; weighted as the training loss is."""
        weight, lm_weight = self._run.loss.recon_loss_weight, self._run.loss.lm_loss_weight
        return BrokenDownLosses(
            recon_loss_by_timestep=_named(_bucket_names(self._num_buckets), losses.by_timestep, weight),
            lm_loss_by_source=_named(self._names, losses.lm_by_source, lm_weight),
            recon_loss_by_source=_named(self._names, losses.recon_by_source, weight),
        )


def _is_due(interval: int | None, iteration: int, train_iters: int) -> bool:
    return interval is not None and (iteration % interval == 0 or iteration == train_iters)


def _named(names: list[str], means: list[Mean], weight: float = 1.0) -> dict[str, float]:
    return {name: mean.value * weight for name, mean in zip(names, means, strict=bool(means)) if mean.count}


def _bucket_names(num_buckets: int) -> list[str]:
    """`000-099` for the first of ten, both ends included."""
    if not num_buckets:
        return []
    ends = [-(-bucket * NUM_TRAIN_TIMESTEPS // num_buckets) for bucket in range(num_buckets + 1)]
    return [f"{first:03d}-{end - 1:03d}" for first, end in itertools.pairwise(ends)]
