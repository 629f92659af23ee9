"""Where figures come from: date, machine, versions, command, commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_ross.compat import versions

PACKAGES = ("torch", "megatron-core", "transformers", "diffusers", "triton", "transformer-engine")


def environment() -> dict[str, Any]:
    """What every results file says about itself."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "command": " ".join(["python", _relative(sys.argv[0]), *sys.argv[1:]]),
        "commit": commit(),
    }


def machine() -> str:
    """The GPU, or the processor and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"


def commit() -> str:
    """Short hash; `+` says that tracked files differ from it. A copy without history is told its commit by COMMIT."""
    if told := os.environ.get("COMMIT"):
        return told

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    if shutil.which("git") is None or not (head := git("rev-parse", "--short", "HEAD")):
        return "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _relative(script: str) -> str:
    path = Path(script).resolve()
    root = Path(__file__).resolve().parent.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name
