"""What the system knows about a process: memory, files, threads, children."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessStats:
    """Resident memory in bytes; numbers of open files, threads and zombie children."""

    rss: int
    files: int
    threads: int
    zombies: int


def own_stats() -> ProcessStats:
    """Of this process, from /proc."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return ProcessStats(
        rss=int(status["VmRSS"].split()[0]) * 1024,
        files=len(os.listdir("/proc/self/fd")) - 1,  # the listing itself is one
        threads=int(status["Threads"]),
        zombies=sum(_is_zombie(child) for child in _children()),
    )


def _children() -> list[str]:
    return [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


def _is_zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:  # it has ended and is gone
        return False
