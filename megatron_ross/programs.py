"""The project's own programs as processes, which do not outlive their caller."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
LAUNCHER_VARIABLE = "TORCHELASTIC_RUN_ID"
"""In the environment of what torchrun starts."""


def end_with_launcher() -> None:
    """Let the kernel send SIGTERM to this process when torchrun, its parent, is gone, however it went.

    torchrun ends its ranks unless it is killed by SIGKILL; they would train on, unseen, with nobody to restart them. On
    SIGTERM a run saves and leaves. Without torchrun nothing is done: the parent is then a shell, which may go while a
    run stays. Linux only.
    """
    if LAUNCHER_VARIABLE not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it went meanwhile
        os.kill(os.getpid(), signal.SIGTERM)


def start_program(command: Sequence[str], root: Path, output: IO[str] | None = None) -> subprocess.Popen[bytes]:
    """Start a command in the folder `root`, one thread per rank unless OMP_NUM_THREADS says otherwise.

    Args:
        output: where both of its streams go; None: to ours.
    """
    environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output, start_new_session=True)


def end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End a process and everything it started. It is asked first; what is left when it has ended is killed."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + grace_s
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
