"""Ends a run that stands still: every rank shows where it stands, and says which ranks do not answer.

It covers what the time limits of collectives do not, a deadlock among threads or a file system that does not answer.
Its limit is shorter than theirs, because they only say that somebody is missing. It needs no help of the main thread.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch.distributed as dist

from megatron_ross.threads import in_thread

FOLDER_NAME = "hang"
_LAST_RESORT_S = 30.0
_PATIENCE_S, _WRITING_S = 10.0, 2.0
"""Longest times to wait for the other ranks, and for the report to be written."""


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
        """What may block, too, does so in a thread of its own: run folder, stderr, the store to ask other ranks in."""
        rank, patience_s = dist.get_rank(), min(_PATIENCE_S, self._limit_s / 2)
        stands = f"rank {rank}: no progress for {self._limit_s:.0f} s in {self._phase}; it stands at\n{_stacks()}\n"
        answer: Future[str] = Future()
        reports = [in_thread(partial(_report, sys.stderr, stands, answer), "watchdog")]
        if self._folder is not None:
            path = self._folder / f"rank-{rank}.txt"
            reports.append(in_thread(partial(_report_to_file, path, stands, answer), "watchdog"))
        asking = in_thread(partial(_ask_the_others, self._phase, patience_s), "watchdog")
        try:
            answer.set_result(asking.result(patience_s + _WRITING_S))
        except TimeoutError:
            answer.set_result("cannot ask the other ranks: who holds their store (rank 0, or torchrun) does not answer")
        wait(reports, _WRITING_S)
        os._exit(1)


def _report(out: TextIO, stands: str, answer: Future[str]) -> None:
    print(stands, end="", file=out, flush=True)
    print(answer.result(), file=out, flush=True)


def _report_to_file(path: Path, stands: str, answer: Future[str]) -> None:
    with contextlib.suppress(OSError):  # stderr has it, too
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            _report(file, stands, answer)


def _stacks() -> str:
    """Where every thread stands, the innermost call first. No source lines: their file system may be what hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, top in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}:")
        frame: FrameType | None = top
        while frame is not None:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
            frame = frame.f_back
    return "\n".join(lines)


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
