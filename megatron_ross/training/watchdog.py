"""Ends a run that stands still: every rank shows where it stands, and says which ranks do not answer.

Collectives have time limits of their own. This one covers what they do not: a rank stopped by the system, a deadlock
among threads, a file system that does not answer. It needs no cooperation of the main thread.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

FOLDER_NAME = "hang"
_LAST_RESORT_S = 30.0


class Watchdog:
    """Watches the time since the last `beat`.

    Args:
        limit_s: longest time between two beats; 0 watches nothing.
        folder: run folder; the report goes to its `hang/rank-N.txt` and to stderr. None: stderr alone.
    """

    def __init__(self, limit_s: float, folder: Path | None) -> None:
        self._limit_s = limit_s
        self._folder = None if folder is None else folder / FOLDER_NAME
        self._phase, self._since = "start", time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if limit_s:
            self._thread.start()

    def beat(self, phase: str) -> None:
        """Something new begins."""
        self._phase, self._since = phase, time.monotonic()
        if self._limit_s and not self._stop.is_set():
            # Written in C: works even where a library holds Python's global lock for ever.
            faulthandler.dump_traceback_later(self._limit_s + _LAST_RESORT_S, exit=True)

    def stop(self) -> None:
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._limit_s / 10)):
            if time.monotonic() - self._since > self._limit_s:
                self._end_the_run()

    def _end_the_run(self) -> None:
        text = f"rank {dist.get_rank()}: no progress for {self._limit_s:.0f} s in {self._phase}; it stands at\n"
        if self._folder is None:
            self._report([sys.stderr], text)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank-{dist.get_rank()}.txt").open("w") as file:
                self._report([sys.stderr, file], text)
        os._exit(1)

    def _report(self, outputs: list[TextIO], text: str) -> None:
        for out in outputs:
            out.write(text)
            out.flush()  # what follows bypasses Python's buffer
            faulthandler.dump_traceback(out)
        answer = _ask_the_others(self._phase, min(10.0, self._limit_s / 2))
        for out in outputs:
            out.write(f"{answer}\n")
            out.flush()


def _ask_the_others(phase: str, patience_s: float) -> str:
    """Every rank signs in; whoever has not after a while does not run. Ranks are up to a step apart."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"hang/{dist.get_rank()}", phase)
        deadline = time.monotonic() + patience_s
        silent = list(range(dist.get_world_size()))
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not store.check([f"hang/{rank}"])]
            time.sleep(0.1)
    except RuntimeError as error:  # the process that holds the store is the one that is gone
        return f"cannot ask the other ranks: {error}"
    if silent:
        return f"ranks {silent} do not answer: look at their machines first"
    return "all ranks answer: a deadlock, or different collectives on different ranks; compare their stacks"
