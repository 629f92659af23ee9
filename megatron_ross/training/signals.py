"""SIGTERM and SIGUSR1 ask for a checkpoint and an orderly end."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignal:
    """Remembers that this rank was asked to stop; the trainer ends all ranks after the same step.

    A rank that cannot get there (it waits for one that died) leaves after `grace_s`.
    """

    def __init__(self, grace_s: float) -> None:
        self.number = 0
        self._grace_s = grace_s
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number = number
            signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)
