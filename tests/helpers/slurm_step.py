"""A stand-in for srun: starts the tasks of several nodes here, passes signals on, ends all when one task fails.

Run as a program: slurm_step.py [--kill-on-bad-exit=1] COMMAND..., with SLURM_NNODES and SLURM_NTASKS_PER_NODE set.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

KILL_WAIT_S = 3.0  # between TERM and KILL, as in slurm.conf


def start_tasks(command: list[str]) -> list[subprocess.Popen[bytes]]:
    """One process per task with the variables that Slurm gives it."""
    nodes, per_node = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for number in range(nodes * per_node):
        identity = {
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number % per_node),
            "SLURM_NODEID": str(number // per_node),
            "SLURM_NTASKS": str(nodes * per_node),
        }
        tasks.append(subprocess.Popen(command, env=os.environ | identity))
    return tasks


def exit_code(tasks: list[subprocess.Popen[bytes]]) -> int:
    """The highest code, 128 + N for a task that signal N ended."""
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def end_all(tasks: list[subprocess.Popen[bytes]]) -> None:
    for task in tasks:
        task.terminate()
    deadline = time.monotonic() + KILL_WAIT_S
    while time.monotonic() < deadline and any(task.poll() is None for task in tasks):
        time.sleep(0.05)
    for task in tasks:
        task.kill()
        task.wait()


def main(arguments: list[str]) -> int:
    kill_on_bad_exit = "--kill-on-bad-exit=1" in arguments
    tasks = start_tasks([word for word in arguments if not word.startswith("--kill-on-bad-exit")])
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda received, _: [task.send_signal(received) for task in tasks])
    while any(task.poll() is None for task in tasks):
        if kill_on_bad_exit and any(task.poll() for task in tasks):
            print("srun: error: a task failed; ending the step", file=sys.stderr, flush=True)
            end_all(tasks)
        time.sleep(0.05)
    return exit_code(tasks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
