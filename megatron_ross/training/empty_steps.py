"""Steps that train nothing: counted, and a reason to stop when they do not end."""

from __future__ import annotations

import math

from megatron_ross.config.schema import RunConfig
from megatron_ross.planner.workload import Work
from megatron_ross.training.errors import TrainingError


class EmptySteps:
    """Looks at every step of a run.

    A single empty step is no mistake: stage 1 has no gradient for a batch of text-only samples, and a small batch may
    consist of broken ones. Many in a row are; so is a whole epoch, or a whole run, that is shorter.

    Args:
        steps_per_epoch, train_iters: of the run.
    """

    def __init__(self, run: RunConfig, steps_per_epoch: int, train_iters: int) -> None:
        self._supervises_text = run.loss.supervises_text
        self._setting = run.optimizer.max_empty_steps
        self._most = max(1, min(self._setting, steps_per_epoch, train_iters))
        self.total = 0
        self.in_a_row = 0

    @classmethod
    def of(cls, run: RunConfig, epoch_length: int, train_iters: int) -> EmptySteps:
        """Of a run with so many sequences per epoch."""
        return cls(run, math.ceil(epoch_length / run.data.global_batch_size), train_iters)

    def look(self, iteration: int, work: Work, grad_norm: float) -> None:
        """Count the step if it was empty; `work` is the global batch's.

        Raises:
            TrainingError: as many in a row as are allowed.
        """
        reason = self._reason(work, grad_norm)
        if not reason:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= self._most:
            first = iteration - self.in_a_row + 1
            raise TrainingError(
                f"iterations {first} to {iteration} trained nothing: the last one had {reason}; "
                f"{self.in_a_row} such step(s) in a row are too many (max_empty_steps={self._setting}, or an epoch, or "
                "the run); check the data with tools/prepare_data.py"
            )

    def _reason(self, work: Work, grad_norm: float) -> str:
        """Why a step was empty; nothing if it was not."""
        if self._supervises_text and not work.supervised_tokens:
            return "no supervised token: answers are missing, masked, or behind the end of seq_length"
        if not self._supervises_text and not work.reconstructed_images:
            return "no image to reconstruct, and with lm_loss_weight=0 there is nothing else"
        if grad_norm == 0:
            return "a gradient norm of exactly 0: no trained part got a gradient from its samples"
        return ""
