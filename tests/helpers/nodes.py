"""Machines of a cluster played by processes on this one: a cluster script, all it starts, and how to pull the plug."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.sources import ROOT

TAG = "PLAYED_NODE"
"""Variable in the environment of every process of a node; its value is the node's folder."""
LIMIT_S = 900.0
"""Longest wait for anything, on a machine that has a lot else to do."""
_POLL_S = 0.05


class Node:
    """One machine in `folder`: runs a script of examples/cluster, in the repository, without GPUs."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self.log = folder / "log"
        programs = folder / "bin"
        programs.mkdir(parents=True)
        self.add_program("python", f'exec {sys.executable} -W ignore "$@"')
        self.add_program("torchrun", f'exec {sys.executable} -W ignore -m torch.distributed.run "$@"')
        self.env = os.environ | {
            TAG: str(folder),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
            **env,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def add_program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(stat.S_IRWXU)

    def start(self, script: str, *arguments: str) -> None:
        """Start the script; its output goes to the end of `log`."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(ROOT / "examples" / "cluster" / script), *arguments],
                cwd=ROOT,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        """To the script alone."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        """The script's exit code."""
        assert self.process is not None
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.folder.name} did not end within {LIMIT_S:.0f} s:\n{self.tail()}") from None

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that must happen while the script runs."""
        assert self.process is not None
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            code = self.process.poll()
            assert code is None, f"{self.folder.name} ended with {code} before {what}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"{what} did not happen within {LIMIT_S:.0f} s:\n{self.tail()}"
            time.sleep(_POLL_S)

    def pids(self, **variables: str) -> list[int]:
        """Processes of this node whose environment also has these variables."""
        wanted = [f"{name}={value}".encode() for name, value in ({TAG: str(self.folder)} | variables).items()]
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                words = path.read_bytes().split(b"\0")
            except (FileNotFoundError, PermissionError, ProcessLookupError):  # ended, or another user's
                continue
            if all(word in words for word in wanted):
                found.append(int(path.parent.name))
        return found

    def kill(self, **variables: str) -> None:
        """KILL these processes, also those that start meanwhile."""
        while pids := self.pids(**variables):
            for pid in pids:
                _kill(pid)
            time.sleep(_POLL_S)

    def lose_power(self) -> None:
        """KILL everything that runs on this node."""
        self.kill()
        if self.process is not None:
            self.process.wait()

    def tail(self) -> str:
        """The end of what the script printed."""
        return self.log.read_text(errors="replace")[-4000:]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # ended by itself since it was found
        return


def free_port(low: int = 1024, high: int = 65535) -> int:
    """A port that nobody listens on now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if low <= port <= high:
            return port
