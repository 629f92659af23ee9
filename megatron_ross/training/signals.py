"""SIGTERM and SIGUSR1 ask for a checkpoint and an orderly end."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import torch.distributed as dist

NUMBERS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers that this rank was asked to stop; the trainer ends all ranks after the same step.

    A rank that cannot get there (it waits for one that died) leaves after `grace_s`. Python runs signal handlers in
    the main thread, once it is back from a call into C++, so `number` says nothing while a collective waits. The clock
    therefore runs in a thread, to which Python's own handler in C writes the signal's number at once.
    """

    def __init__(self, grace_s: float) -> None:
        self.number = 0
        self._grace_s = grace_s
        self._over = threading.Event()
        for number in NUMBERS:
            signal.signal(number, self._handle)
        self._arrivals, arrives = os.pipe()
        os.set_blocking(arrives, False)
        signal.set_wakeup_fd(arrives, warn_on_full_buffer=False)
        threading.Thread(target=self._count_down, name="stop-signal", daemon=True).start()

    def cancel(self) -> None:
        """All is saved: the clock stops. A signal from now on changes nothing."""
        self._over.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    def _count_down(self) -> None:
        number = 0
        while number not in NUMBERS:
            (number,) = os.read(self._arrivals, 1)
        if self._over.wait(self._grace_s):
            return
        text = (
            f"rank {dist.get_rank()}: stopped {self._grace_s:g} s after {signal.Signals(number).name} without a "
            "checkpoint: the step or the save did not end in time (preemption_grace_seconds)\n"
        )
        os.write(2, text.encode())  # not through sys.stderr, which the main thread may hold
        os._exit(128 + number)
