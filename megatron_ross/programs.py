"""The project's own programs as processes: each in a process group of its own that does not outlive its caller."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_POLL_S = 0.1


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
