"""Which ranks are slow: Megatron's straggler detector, reported with every log line. GPUs only."""

from __future__ import annotations

import contextlib
import logging
from contextlib import AbstractContextManager

import torch.distributed as dist
from megatron.core.utils import StragglerDetector

_RANKS_SHOWN = 4


class StragglerReport:
    """Times the forward and backward pass of every rank; off unless `enabled`.

    Megatron's detector is one per process. Its log line names the ranks with the least and the most time, throughput,
    temperature, power and clock.
    """

    def __init__(self, enabled: bool) -> None:
        self._detector: StragglerDetector | None = None
        if enabled:
            logging.getLogger("megatron.core.utils").setLevel(logging.INFO)
            self._detector = StragglerDetector()
            self._detector.configure(dist.get_world_size(), dist.get_rank(), mmcnt=_RANKS_SHOWN, enabled=True)

    def step(self) -> AbstractContextManager:
        """Around the work of one step."""
        return contextlib.nullcontext() if self._detector is None else self._detector(bdata=False)

    def report(self, total_flops: float, num_steps: int) -> None:
        """What the ranks did since the last report. A collective call."""
        if self._detector is not None:
            self._detector.report(total_flops, num_steps)
