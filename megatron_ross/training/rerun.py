"""Megatron's rerun state machine: does a wrong result come again when the step is computed again on the same data?

`validate_results` repeats a step whose loss is not finite. A result that does not come again was a transient error of
the hardware, and the second one is used; one that does is the model's or the data's, and the step is treated as any
non-finite step. `report_determinism_stats` repeats every step and reports how far the two runs differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.rerun_state_machine import (
    QuickStats,
    RerunMode,
    RerunStateMachine,
    _set_rerun_state_machine,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
)
from torch import Tensor

from megatron_ross.models.loss_breakdown import LossBreakdown
from megatron_ross.platform import show_log

RerunModeName = Literal["disabled", "validate_results", "report_determinism_stats"]
FILE_NAME = "rejected_results.jsonl"


def start_rerun(mode: RerunModeName, folder: Path | None) -> Rerun | None:
    """The machine of a run with this `rerun_mode`; rejected results are written down in `folder`."""
    if mode == "disabled":
        return None
    destroy_rerun_state_machine()
    tracker = None if folder is None else str(folder / FILE_NAME)
    _set_rerun_state_machine(_Machine(RerunMode(mode), tracker))
    show_log("megatron.core.rerun_state_machine")
    return Rerun()


class _Machine(RerunStateMachine):
    """Megatron's, with a report of its own: Megatron's fails on fields that its statistics no longer have."""

    def __init__(self, mode: RerunMode, tracker: str | None) -> None:
        super().__init__(mode=mode, result_rejected_tracker_filename=tracker)
        self._total = QuickStats()

    def _maybe_report_stats(self) -> None:
        """How far the two runs of every step so far differ, over all ranks. A collective call."""
        if self.current_iteration % self.REPORTING_INTERVAL_ITERATIONS:
            return
        everyone: list[list[QuickStats]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, list(self.stats.values()))
        self.stats.clear()
        self._total.combine([stats for rank in everyone for stats in rank])
        if dist.get_rank() == 0:
            print(f"losses computed twice since the start: {self._total.print_stats()}", flush=True)


class Rerun:
    """Attempts at one step after the other; Megatron keeps the machine as a global, so there is one per process."""

    def attempts(self, breakdown: LossBreakdown | None) -> Iterator[None]:
        """As often as Megatron wants the step computed; the last attempt counts. A collective iteration.

        Args:
            breakdown: what this rank's stages add to.
        """
        machine = get_rerun_state_machine()
        before = None if breakdown is None else breakdown.sums.clone()
        while machine.should_run_forward_backward(None):
            if breakdown is not None and before is not None:
                breakdown.sums.copy_(before)  # not subtracted: NaN would stay, and rounding
            yield
        machine.should_checkpoint_and_exit()  # tells the machine that the step is over

    def check(self, losses: Tensor) -> None:
        """Look at this rank's summed losses [2] of the attempt."""
        get_rerun_state_machine().validate_result(
            result=losses.sum(),
            rejection_func=lambda result: not bool(torch.isfinite(result)),
            message="loss is not finite",
            fatal=False,
        )
