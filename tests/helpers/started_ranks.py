"""The entry point on several ranks without torchrun: for tests that send signals and read exit codes and messages."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers.distributed import PRELOAD
from tests.helpers.nodes import free_port

START_S = 300.0
"""Longest time to the second iteration, on a machine that has a lot else to do."""


class StartedRanks:
    """Processes that train in the run folder `settings["save"]`, forked from a server that has imported torch.

    What they say goes to files there whose names begin with `log`.
    """

    def __init__(self, world_size: int, settings: dict[str, Any], log: str = "log") -> None:
        self.folder, self._name = Path(settings["save"]), log
        arguments = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        port = free_port()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.processes = [
            context.Process(target=_main, args=(rank, world_size, port, arguments, self._log(rank)), daemon=True)
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def _log(self, rank: int) -> Path:
        return self.folder / f"{self._name}-{rank}"

    def said(self, rank: int) -> str:
        """Standard output and error of a rank."""
        return self._log(rank).read_text(errors="replace")

    def wait_for_iteration(self, iteration: int) -> None:
        deadline, path = time.monotonic() + START_S, self.folder / "metrics.jsonl"
        while not path.exists() or not any(f'"iteration": {iteration},' in line for line in path.open()):
            assert time.monotonic() < deadline, self.said(0)
            assert all(process.is_alive() for process in self.processes), self.said(0)
            time.sleep(0.1)

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, rank: int, limit_s: float) -> tuple[int | None, float]:
        """(exit code, seconds until then); the code of a rank that is still there after `limit_s` is None."""
        begin = time.monotonic()
        self.processes[rank].join(limit_s)
        return self.processes[rank].exitcode, time.monotonic() - begin


@contextlib.contextmanager
def started_ranks(world_size: int, settings: dict[str, Any], log: str = "log") -> Iterator[StartedRanks]:
    """Ranks that are gone afterwards."""
    ranks = StartedRanks(world_size, settings, log)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()


def _main(rank: int, world_size: int, port: int, arguments: list[str], log: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import torch

    from megatron_ross.training.main import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))
