"""How long a run is, and its learning rate: functions of the settings of the run that starts and of its progress.

Both are counted in sequences, because batch sizes may change at any checkpoint; settings that name iterations are
translated with the batch sizes that those iterations had. A run whose batch size never changes has, to the last bit,
the learning rates of one that counts iterations.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import OptimizerSettings, RunConfig, TrainingConfig
from megatron_ross.data.order import SampleOrder


class BatchSpan(NamedTuple):
    """From here on a run has this global batch size. The size is no whole number where only a mean is known."""

    iteration: int
    sequences: int
    size: float


@dataclass(frozen=True)
class BatchHistory:
    """The global batch sizes of a run, the first from iteration 0 on."""

    spans: tuple[BatchSpan, ...]

    @classmethod
    def constant(cls, size: float) -> BatchHistory:
        return cls((BatchSpan(0, 0, size),))

    def then(self, iteration: int, sequences: int, size: int) -> BatchHistory:
        """The same with this size from `iteration` on, `sequences` having been consumed by then."""
        if self.spans[-1].size == size:
            return self
        before = tuple(span for span in self.spans if span.iteration < iteration)
        return BatchHistory((*before, BatchSpan(iteration, sequences, size)))

    def sequences_at(self, iteration: int) -> int:
        """How many sequences have been consumed after so many iterations."""
        span = next(span for span in reversed(self.spans) if span.iteration <= max(0, iteration))
        return round(span.sequences + (max(0, iteration) - span.iteration) * span.size)

    def warmup_end(self, start: int, end: int, share: float) -> int:
        """The first iteration's end, in sequences, at or behind this share of the way from `start` to `end`."""
        followers = [span.sequences for span in self.spans[1:]]
        for span, follower in itertools.zip_longest(self.spans, followers):
            # In iterations, as a run of constant batch size has always rounded it.
            count = share * ((end - start) / span.size) - (span.sequences - start) / span.size
            place = round(span.sequences + max(0, math.ceil(count)) * span.size)
            if follower is None or place <= follower:
                return place
        raise AssertionError("the last span has no follower")


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        sequences: consumed so far.
        continued_at: the iteration at which it last went on after its end; None: it never has.
    """

    iteration: int
    sequences: int
    batches: BatchHistory
    continued_at: int | None = None


@dataclass(frozen=True)
class Schedule:
    """Learning rate over sequences: a linear rise from 0 over `warmup` of them, then `style`, until `length`.

    Attributes:
        start: the number of consumed sequences at which it begins.
    """

    start: int
    warmup: int
    length: int
    style: str


@dataclass(frozen=True)
class RunPlan:
    """What a run does from `progress` on: until iteration `train_iters`, by `schedule`."""

    progress: Progress
    train_iters: int
    schedule: Schedule

    @property
    def num_sequences(self) -> int:
        """Of the whole run, with what was consumed before."""
        return self.progress.batches.sequences_at(self.train_iters)


def plan_training(run: RunConfig, order: SampleOrder, progress: Progress | None, had_ended: bool = False) -> RunPlan:
    """Length and schedule of a run.

    Args:
        progress: at the checkpoint to resume; None: the run begins.
        had_ended: that checkpoint is the last of a run, by the settings which it was trained with.

    Raises:
        ConfigError: the run goes on after its end, and `lr_continue` does not say at which learning rate.
    """
    size = run.data.global_batch_size
    now = progress or Progress(0, 0, BatchHistory.constant(size))
    batches = now.batches.then(now.iteration, now.sequences, size)
    train_iters = num_iterations(run, order, now)
    goes_on = train_iters > now.iteration
    continued_at = now.iteration if had_ended and goes_on else now.continued_at
    if goes_on and continued_at is not None:
        _check_continued(run, now.iteration, continued_at)
    now = Progress(now.iteration, now.sequences, batches, continued_at)
    return RunPlan(now, train_iters, _schedule(run.optimizer, now, train_iters, size))


def num_iterations(run: RunConfig, order: SampleOrder, progress: Progress | None = None) -> int:
    """`train_iters`, or enough iterations to see every sample `num_epochs` times; the last may reach into the next
    epoch. Those before `progress` count, whatever batches they had."""
    if progress is None:
        return max(1, _remaining(run.training, order, run.data.global_batch_size, 0, 0))
    left = _remaining(run.training, order, run.data.global_batch_size, progress.iteration, progress.sequences)
    return progress.iteration + left


def has_ended(training: TrainingConfig, order: SampleOrder, progress: Progress) -> bool:
    """Whether a run with these settings has nothing left to do."""
    return _remaining(training, order, 1, progress.iteration, progress.sequences) == 0


def _remaining(training: TrainingConfig, order: SampleOrder, size: int, iteration: int, consumed: int) -> int:
    """Iterations that are left with this global batch size."""
    if training.train_iters is not None:
        return max(0, training.train_iters - iteration)
    return max(0, math.ceil((num_sequences(order, training.num_epochs) - consumed) / size))


def num_sequences(order: SampleOrder, num_epochs: float) -> int:
    """Of so many epochs, rounded up."""
    whole, rest = divmod(num_epochs, 1)
    sequences = sum(order.epoch_length(epoch) for epoch in range(int(whole)))
    return sequences + (math.ceil(rest * order.epoch_length(int(whole))) if rest else 0)


def _check_continued(run: RunConfig, iteration: int, continued_at: int) -> None:
    optimizer, training = run.optimizer, run.training
    if optimizer.lr_continue is not None or optimizer.lr_decay_style == "constant":
        return
    longer = (
        f"num_epochs={training.num_epochs:g}" if training.train_iters is None else f"train_iters={training.train_iters}"
    )
    since = f" and has gone on to iteration {iteration}" if continued_at < iteration else ""
    raise ConfigError(
        f"{longer}: the run to resume had ended after iteration {continued_at}{since}, and its learning-rate schedule "
        "with it; set lr_continue to constant (lr all the time), rewarm (a new warm-up and decay over what is left) or "
        "schedule (that of the whole, longer run)"
    )


def _schedule(settings: OptimizerSettings, progress: Progress, train_iters: int, size: int) -> Schedule:
    batches, begin, style = progress.batches, 0, settings.lr_decay_style
    if progress.continued_at is not None and settings.lr_continue == "constant":
        return Schedule(0, 0, max(1, batches.sequences_at(train_iters)), "constant")
    if progress.continued_at is not None and settings.lr_continue == "rewarm":
        begin = progress.continued_at
    start, end = batches.sequences_at(begin), batches.sequences_at(train_iters)
    if settings.lr_warmup_iters is not None:
        warm = batches.sequences_at(begin + settings.lr_warmup_iters)
    else:
        warm = batches.warmup_end(start, end, settings.lr_warmup_fraction or 0.0)
    length = max(1, end - start)
    return Schedule(start, max(0, min(warm - start, length - size)), length, style)
