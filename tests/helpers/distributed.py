"""Run a function on several ranks.

    losses = run_ranks(loss_of, 4, "VEt*2|t*2NDH")  # on each rank, loss_of(rank, world_size, "VEt*2|t*2NDH")

The function must be at module level. It finds `torch.distributed` initialised (gloo unless asked otherwise, meeting
through a file, so no ports can collide) and leaves what it likes behind: every call gets new processes. They are forked
from one server that has imported torch and Megatron, so starting them takes a fraction of a second; those of `nccl` are
started afresh. Ranks that lived on would collect gloo's threads, which poll until their process ends: some 75 for each
layout that a rank walks through.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

STARTUP_S = 300.0
"""Longest time that the ranks may take to start; not part of the limit of the call."""

PRELOAD = ["megatron_ross.training.trainer", "megatron_ross.training.main", "megatron_ross.parity.runner"]
"""What the server imports; ranks import whatever else they need themselves."""


class RankError(RuntimeError):
    """A rank raised, died or did not finish in time; the message says which and holds its traceback."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 400.0,
    backend: str = "gloo",
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(rank, world_size, *args, **kwargs)` on every rank.

    Args:
        fn: a module-level function; its arguments and results are pickled.
        timeout_s: limit for the slowest rank, not counting the start of the ranks; a machine may have a lot else to do.
        env: environment variables on top of this process's.
    Returns:
        what each rank returned, by rank.
    Raises:
        RankError: a rank raised, died, or was still running at the limit. All ranks are gone in any case.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}, but at least one rank is needed")
    task = (fn.__module__, sys.modules[fn.__module__].__file__, fn.__qualname__, pickle.dumps((args, kwargs)))
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    ranks = _Ranks(folder)
    try:
        ranks.start(task, world_size, backend, env or {})
        ranks.collect(STARTUP_S)  # each says that it has joined the process group
        return ranks.collect(timeout_s)
    finally:  # a keyboard interrupt must not leave ranks behind either
        ranks.kill()
        shutil.rmtree(folder, ignore_errors=True)


class _Ranks:
    """The processes of one call. Each sends two messages, (time, traceback or None, pickled value)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Any] = []
        self.connections: list[Connection] = []

    def start(self, task: tuple[str, Any, str, bytes], world_size: int, backend: str, env: dict[str, str]) -> None:
        # What the server imports may ask how many GPUs there are; a process forked after that cannot use them.
        context = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
        context.set_forkserver_preload(PRELOAD)
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, task, rank, world_size, backend, env, str(self.folder))
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def kill(self) -> None:
        """Kill every rank together with what it started."""
        for process in self.processes:
            _kill_group(process.pid)
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()

    def collect(self, limit: float) -> list[Any]:
        """Wait for the next message of every rank, or for the first failure."""
        deadline = time.monotonic() + limit
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []
        everyone = range(len(self.processes))
        while len(results) < len(everyone) and not failures:
            pending = [self.connections[rank] for rank in everyone if rank not in results]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(self._describe_hang(limit, [rank for rank in everyone if rank not in results]))
            self._receive(ready, results, failures)
        if failures:
            # Ranks that waited for the failed one fail a little later; the earliest failure is the cause.
            time.sleep(0.2)
            heard = results.keys() | {rank for _, rank, _ in failures}
            rest = [self.connections[rank] for rank in everyone if rank not in heard]
            self._receive([connection for connection in rest if connection.poll()], results, failures)
            _, rank, text = min(failures)
            raise RankError(f"rank {rank} of {len(everyone)} failed:\n{text}")
        return [results[rank] for rank in everyone]

    def _receive(self, ready: list[Any], results: dict[int, Any], failures: list[tuple[float, int, str]]) -> None:
        for connection in ready:
            rank = self.connections.index(connection)
            try:
                when, error, payload = connection.recv()
            except (EOFError, ConnectionResetError):
                self.processes[rank].join(timeout=5.0)
                code = self.processes[rank].exitcode
                failures.append((time.time(), rank, f"the process ended without an answer, exit code {code}"))
                continue
            if error is None:
                results[rank] = pickle.loads(payload)
            else:
                failures.append((when, rank, error))

    def _describe_hang(self, limit: float, missing: list[int]) -> str:
        """Which ranks are late, and where each of them stands."""
        paths = {rank: self.folder / f"stack-{rank}" for rank in missing}
        for rank, path in paths.items():
            if path.exists():  # it has its signal handler
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        stacks = [
            f"rank {rank} stands at:\n{path.read_text() if path.exists() else '(still starting)'}"
            for rank, path in paths.items()
        ]
        return f"ranks {missing} of {len(self.processes)} were not done after {limit:.0f} s\n" + "\n".join(stacks)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # not yet its own group, or gone
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _serve(
    connection: Connection,
    task: tuple[str, str, str, bytes],
    rank: int,
    world_size: int,
    backend: str,
    env: dict[str, str],
    folder: str,
) -> None:
    """Main function of a rank: join the process group, say so, run the task, send what it returns."""
    import ctypes
    import faulthandler

    os.setsid()  # own process group, so that a rank can be killed with all its children
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the server, which dies with the tests
    faulthandler.register(signal.SIGUSR1, file=open(f"{folder}/stack-{rank}", "w"), all_threads=False)  # noqa: SIM115
    os.environ.update({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | env)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)})
    for step in (lambda: _initialise(rank, world_size, backend, folder), lambda: _run(task, rank, world_size)):
        try:
            answer = (time.time(), None, pickle.dumps(step()))
        except BaseException:  # SystemExit too: the tests must hear of it
            connection.send((time.time(), traceback.format_exc(), b""))
            break
        connection.send(answer)
    signal.pause()  # until killed: leaving now would break collectives that others are still in


def _initialise(rank: int, world_size: int, backend: str, folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = torch.distributed.FileStore(f"{folder}/store", world_size)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def _run(task: tuple[str, str, str, bytes], rank: int, world_size: int) -> Any:
    module_name, file, function_name, payload = task
    fn: Any = _load(module_name, file)
    for part in function_name.split("."):
        fn = getattr(fn, part)
    args, kwargs = pickle.loads(payload)
    return fn(rank, world_size, *args, **kwargs)


def _load(name: str, file: str) -> Any:
    """The module by its name in the test process; pytest may have made that name up, so load by file."""
    import importlib.util

    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
