"""Processes that want the lease of a run folder, forked from a server that has imported what they need."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

from megatron_ross.training import lease as lease_module
from megatron_ross.training.lease import Lease, LeaseError
from tests.helpers.distributed import PRELOAD

BEAT_S, EXPIRY_S = 0.1, 4.0
_FOREVER_S = 1000.0
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


def quick_lease(folder: Path) -> Lease:
    """One whose holder is soon taken for dead."""
    return Lease(folder, BEAT_S, EXPIRY_S)


def start_holder(folder: Path, machine: str = "") -> Any:
    """A process that holds the lease until it is killed; `machine` makes it one of elsewhere."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_hold, args=(folder, theirs, machine), daemon=True)
    process.start()
    assert ours.recv()
    return process


def _hold(folder: Path, ready: Any, machine: str) -> None:
    if machine:
        lease_module._machine = lambda: machine
    quick_lease(folder).acquire()
    ready.send(True)
    time.sleep(_FOREVER_S)


def start_racers(folder: Path, count: int) -> tuple[list[Any], list[bool]]:
    """Processes that ask for the lease at the same moment, and whether each got it."""
    go, answers = CONTEXT.Event(), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=_race, args=(folder, go, answers), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    go.set()
    return processes, [answers.get(timeout=120) for _ in processes]


def _race(folder: Path, go: Any, answers: Any) -> None:
    lease = quick_lease(folder)
    go.wait()
    try:
        lease.acquire()
        answers.put(True)
    except LeaseError:
        answers.put(False)
    time.sleep(_FOREVER_S)
