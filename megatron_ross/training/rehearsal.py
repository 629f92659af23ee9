"""What the guards of a run would say about its data, found out from a survey of the data instead of by training.

The counters and limits are those of training, and the samples come in the order of training, step by step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from megatron_ross.config.schema import RunConfig
from megatron_ross.data.held_out import NO_SAMPLE, FixedOrder
from megatron_ross.data.order import SampleOrder
from megatron_ross.data.quarantine import MAX_EXAMPLES, Quarantine, TooManyBadSamplesError
from megatron_ross.data.survey import COUNTED, Survey
from megatron_ross.planner.workload import Work
from megatron_ross.training.data import bad_sample_limits
from megatron_ross.training.empty_steps import EmptySteps
from megatron_ross.training.errors import TrainingError

_EPOCHS = 10
"""Rehearsed at most: every epoch has the same samples."""


def rehearse(run: RunConfig, survey: Survey, order: SampleOrder, train_iters: int) -> str:
    """At which iteration training would stop because of its data, and why; empty if it would not.

    Args:
        survey: of the whole data set, in the order of sample ids.
    """
    steps_per_epoch = math.ceil(order.epoch_length(0) / run.data.global_batch_size)
    guards = _Guards(run, survey, order, EmptySteps(run, steps_per_epoch, train_iters))
    return guards.walk(min(train_iters, _EPOCHS * steps_per_epoch), "training would stop at iteration")


def rehearse_validation(run: RunConfig, survey: Survey, order: FixedOrder) -> str:
    """The same for a validation; `survey` is of the data set that holds its samples."""
    guards = _Guards(run, survey, order, None)
    stopped = guards.walk(order.num_sequences // run.data.global_batch_size, "validation would stop at batch")
    if stopped or guards.tokens or guards.images:
        return stopped
    return "validation would stop: its samples have no supervised token and no image to reconstruct"


class _Guards:
    """Quarantine and empty steps of a run, fed from a survey."""

    def __init__(self, run: RunConfig, survey: Survey, order: SampleOrder, empty: EmptySteps | None) -> None:
        self._run, self._order, self._empty = run, order, empty
        self._counted = {name: _mask(samples, len(survey.num_tokens)) for name, samples in survey.counted.items()}
        self._supervised = np.array(survey.num_supervised, dtype=np.int64)
        self._images = np.where(self._counted["bad"], 0, survey.num_images)
        self._quarantine = Quarantine(bad_sample_limits(run, order))
        for kind in COUNTED:
            self._quarantine.examples += [f"{kind}: {example}" for example in survey.examples.get(kind, [])]
        del self._quarantine.examples[MAX_EXAMPLES:]
        self.tokens = self.images = 0

    def walk(self, num_steps: int, stop: str) -> str:
        """Steps from the first one to `num_steps`; the first stop as a line that begins with `stop`."""
        consumed = 0
        for step, ids in enumerate(self._steps(num_steps), start=1):
            consumed += len(ids)
            real = ids[ids != NO_SAMPLE]
            try:
                self._look(step, consumed, real)
            except (TooManyBadSamplesError, TrainingError) as error:
                return f"{stop} {step}: {error}"
        return ""

    def _steps(self, num_steps: int) -> Iterator[np.ndarray]:
        size = self._run.data.global_batch_size
        for step in range(num_steps):
            yield self._order.keys(step * size, (step + 1) * size)[:, 1]

    def _look(self, step: int, consumed: int, ids: np.ndarray) -> None:
        for name, is_one in self._counted.items():
            self._quarantine.counts[name] += int(is_one[ids].sum())
        self._quarantine.check(consumed)
        tokens, images = int(self._supervised[ids].sum()), int(self._images[ids].sum())
        self.tokens += tokens
        self.images += images
        if self._empty is not None:
            # Without an image, tower, projector and denoiser get no gradient.
            has_gradient = bool(images) or not self._run.trainability.freeze_language_model
            self._empty.look(step, Work(0, 0, tokens, images, images), float(has_gradient))


def _mask(ids: set[int], size: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[list(ids)] = True
    return mask
