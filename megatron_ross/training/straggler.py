"""Which ranks are slow: Megatron's straggler detector, reported with every log line. GPUs only."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch.distributed as dist
from megatron.core.utils import StragglerDetector

from megatron_ross.platform import show_log

_RANKS_SHOWN = 4


class StragglerReport:
    """Times the steps of every rank; off unless `enabled`.

    Megatron's detector is one per process. Its log line names the ranks with the least and the most time, throughput,
    temperature, power and clock. Rank 0 listens on port 65535: whoever connects to it turns the report off or on.
    """

    def __init__(self, enabled: bool) -> None:
        self._detector: StragglerDetector | None = None
        if enabled:
            show_log("megatron.core.utils")
            self._detector = StragglerDetector()
            # amp: what the FLOPs of a step are divided by; 1, because the backward pass is timed, too.
            self._detector.configure(dist.get_world_size(), dist.get_rank(), mmcnt=_RANKS_SHOWN, amp=1.0, enabled=True)

    def step(self) -> AbstractContextManager:
        """Around the work of one step."""
        return contextlib.nullcontext() if self._detector is None else self._detector(bdata=False)

    def report(self, total_flops: float, num_steps: int) -> None:
        """What the ranks did since the last report. A collective call."""
        if self._detector is not None:
            self._detector.report(total_flops, num_steps)
