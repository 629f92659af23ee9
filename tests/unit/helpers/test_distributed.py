"""The helper that starts ranks: results come back, failures carry their message, nothing hangs or stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.distributed import RankError, run_ranks

pytestmark = pytest.mark.distributed


def sum_of_ranks(rank: int, world_size: int, offset: float) -> float:
    value = torch.tensor([rank + offset])
    torch.distributed.all_reduce(value)
    return value.item()


def fail_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the cat sat on rank one")
    torch.distributed.barrier()


def hang_on_rank_zero(rank: int, world_size: int, child_pid_file: str) -> None:
    if rank == 0:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(child_pid_file).write_text(str(child.pid))
        wait_for_ever()


def wait_for_ever() -> None:
    while True:
        time.sleep(0.05)


def exit_hard(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)


def my_pid_and_threads(rank: int, world_size: int) -> tuple[int, int, str]:
    return os.getpid(), torch.get_num_threads(), os.environ["ROSS_HELPER_TEST"]


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        alive = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def test_results_settings_and_no_leftovers() -> None:
    assert run_ranks(sum_of_ranks, 2, 0.5) == [2.0, 2.0]
    seen = run_ranks(my_pid_and_threads, 2, env={"ROSS_HELPER_TEST": "seen"})
    assert [rest for _, *rest in seen] == [[1, "seen"], [1, "seen"]]
    assert all_gone([pid for pid, *_ in seen])


def test_the_first_failure_is_reported() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed(.|\n)*ValueError: the cat sat on rank one"):
        run_ranks(fail_on_rank_one, 2)


def test_a_rank_that_hangs_is_reported_and_killed_with_its_children(tmp_path: Path) -> None:
    child_pid_file = tmp_path / "child"
    with pytest.raises(RankError, match=r"ranks \[0\] of 2 were not done after 3 s(.|\n)*wait_for_ever"):
        run_ranks(hang_on_rank_zero, 2, str(child_pid_file), timeout_s=3)
    assert all_gone([int(child_pid_file.read_text())]), "a process started by a rank outlived it"


def test_a_rank_that_dies_is_reported() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed(.|\n)*exit code 7"):
        run_ranks(exit_hard, 2)


def test_no_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size is 0"):
        run_ranks(sum_of_ranks, 0, 0.5)
