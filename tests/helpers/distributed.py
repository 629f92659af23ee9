"""Run functions on several ranks, started once and used many times.

Starting a rank costs seconds of imports, so a `RankPool` keeps its ranks and runs one function after another on them:

    with RankPool(4) as ranks:
        losses = ranks.run(loss_of_layout, "VEt*2|t*2NDH")  # loss_of_layout(rank, world_size, "VEt*2|t*2NDH")

`run_ranks` is the same for a single function; the fixture `rank_pool` in conftest.py shares pools within a test file.
The functions must be at module level. They find `torch.distributed` initialised (gloo unless asked otherwise, meeting
through a file, so no ports can collide) and must leave it so; state they put on top, Megatron's included, is theirs
to destroy.
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

STARTUP_S = 120.0
"""Longest time that the ranks may take to start; added to the first call's own limit."""


class RankError(RuntimeError):
    """A rank raised, died or did not finish in time; the message says which and holds its traceback."""


class RankPool:
    """`world_size` processes that run functions together. After a failure the next `run` starts fresh ones."""

    def __init__(self, world_size: int, *, backend: str = "gloo", env: dict[str, str] | None = None) -> None:
        if world_size < 1:
            raise ValueError(f"world_size is {world_size}, but at least one rank is needed")
        self.world_size = world_size
        self.backend = backend
        self.env = env or {}
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._folder: Path | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0, **kwargs: Any) -> list[Any]:
        """Call `fn(rank, world_size, *args, **kwargs)` on every rank.

        Args:
            fn: a module-level function; its arguments and results are pickled.
            timeout_s: limit for the slowest rank, not counting the start of the ranks.
        Returns:
            what each rank returned, by rank.
        Raises:
            RankError: a rank raised, died, or was still running at the limit; all ranks are gone then.
        """
        limit = timeout_s
        if not self._processes:
            self._start()
            limit += STARTUP_S
        task = (fn.__module__, sys.modules[fn.__module__].__file__, fn.__qualname__, pickle.dumps((args, kwargs)))
        try:
            for connection in self._connections:
                connection.send(task)
            return self._collect(limit)
        except BaseException:  # a keyboard interrupt must not leave ranks behind either
            self.close()
            raise

    def close(self) -> None:
        """Kill every rank together with what it started; harmless when nothing runs."""
        for process in self._processes:
            _kill_group(process.pid)
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._connections, self._folder = [], [], None

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            env = {**self.env, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world_size)}
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world_size, self.backend, env, str(self._folder))
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _collect(self, limit: float) -> list[Any]:
        """Wait for every rank's answer, or for the first failure."""
        deadline = time.monotonic() + limit
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []
        while len(results) < self.world_size and not failures:
            pending = [c for rank, c in enumerate(self._connections) if rank not in results]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(self._describe_hang(limit, [r for r in range(self.world_size) if r not in results]))
            self._receive(ready, results, failures)
        if failures:
            # Ranks that waited for the failed one fail a little later; the earliest failure is the cause.
            time.sleep(0.2)
            rest = [
                c for r, c in enumerate(self._connections) if r not in results and r not in {f[1] for f in failures}
            ]
            self._receive([c for c in rest if c.poll()], results, failures)
            _, rank, text = min(failures)
            raise RankError(f"rank {rank} of {self.world_size} failed:\n{text}")
        return [results[rank] for rank in range(self.world_size)]

    def _receive(self, ready: list[Any], results: dict[int, Any], failures: list[tuple[float, int, str]]) -> None:
        for connection in ready:
            rank = self._connections.index(connection)
            try:
                when, error, payload = connection.recv()
            except (EOFError, ConnectionResetError):
                self._processes[rank].join(timeout=5.0)
                code = self._processes[rank].exitcode
                failures.append((time.time(), rank, f"the process ended without an answer, exit code {code}"))
                continue
            if error is None:
                results[rank] = pickle.loads(payload)
            else:
                failures.append((when, rank, error))

    def _describe_hang(self, limit: float, missing: list[int]) -> str:
        """Which ranks are late, and where each of them stands."""
        assert self._folder is not None
        for rank in missing:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        stacks = []
        for rank in missing:
            path = self._folder / f"stack-{rank}"
            stacks.append(f"rank {rank} stands at:\n{path.read_text() if path.exists() else '(still starting)'}")
        return f"ranks {missing} of {self.world_size} were not done after {limit:.0f} s\n" + "\n".join(stacks)


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    backend: str = "gloo",
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """`RankPool.run` on ranks that live for this one call."""
    with RankPool(world_size, backend=backend, env=env) as ranks:
        return ranks.run(fn, *args, timeout_s=timeout_s, **kwargs)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # not yet its own group, or gone
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _serve(connection: Connection, rank: int, world_size: int, backend: str, env: dict[str, str], folder: str) -> None:
    """Main function of a rank: set up, then run tasks until the other end goes away."""
    import ctypes
    import faulthandler

    os.setsid()  # own process group, so that the pool can kill a rank with all its children
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the test process
    faulthandler.register(signal.SIGUSR1, file=open(f"{folder}/stack-{rank}", "w"), all_threads=False)  # noqa: SIM115
    os.environ.update({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | env)
    error = _initialise(rank, world_size, backend, folder)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_answer(task, rank, world_size) if error is None else (time.time(), error, b""))


def _initialise(rank: int, world_size: int, backend: str, folder: str) -> str | None:
    """Returns the traceback if it fails."""
    try:
        import torch

        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        store = torch.distributed.FileStore(f"{folder}/store", world_size)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    except Exception:
        return traceback.format_exc()
    return None


def _answer(task: tuple[str, str, str, bytes], rank: int, world_size: int) -> tuple[float, str | None, bytes]:
    """Run one task; returns (time, None, pickled result) or (time, traceback, nothing)."""
    module_name, file, function_name, payload = task
    try:
        module = _load(module_name, file)
        fn: Any = module
        for part in function_name.split("."):
            fn = getattr(fn, part)
        args, kwargs = pickle.loads(payload)
        return time.time(), None, pickle.dumps(fn(rank, world_size, *args, **kwargs))
    except BaseException:  # SystemExit too: the pool must hear of it
        return time.time(), traceback.format_exc(), b""


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
