"""A rank ends when torchrun, its parent, is killed; a run without torchrun outlives its shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ross.programs import LAUNCHER_VARIABLE
from tests.helpers.sources import ROOT

CHILD = """
import signal, sys, time
from megatron_ross.programs import end_with_launcher
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1] + ".asked", "w").close(), sys.exit(0)))
end_with_launcher()
open(sys.argv[1] + ".ready", "w").close()
time.sleep(1000)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
open(sys.argv[2], "w").write(str(child.pid))
time.sleep(1000)
"""


def _wait_for(path: Path, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
@pytest.mark.parametrize("has_launcher", [True, False], ids=["torchrun", "a shell"])
def test_what_becomes_of_a_rank_whose_parent_is_killed(has_launcher: bool, tmp_path: Path) -> None:
    name = tmp_path / "child"
    environment = {key: value for key, value in os.environ.items() if key != LAUNCHER_VARIABLE}
    environment |= {"PYTHONPATH": str(ROOT)} | ({LAUNCHER_VARIABLE: "none"} if has_launcher else {})
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(name)], env=environment)
    assert _wait_for(name.with_suffix(".ready"), 60)
    child = int(name.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        assert _wait_for(name.with_suffix(".asked"), 30 if has_launcher else 1.5) == has_launcher
    finally:
        if not has_launcher:
            os.kill(child, signal.SIGKILL)
