"""One run at a time has a run folder, whatever became of the one before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.training import lease as lease_module
from megatron_ross.training.lease import LEASE_NAME, Lease, LeaseError
from tests.helpers.lease_holder import EXPIRY_S, quick_lease, start_holder, start_racers


def kill(process: Any, number: int = signal.SIGKILL) -> None:
    os.kill(process.pid, number)
    process.join()


def waited(lease: Lease) -> float:
    begin = time.monotonic()
    lease.acquire()
    return time.monotonic() - begin


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_SETTLE_S", 0.1)
    monkeypatch.setattr(lease_module, "_POLL_S", 0.05)


def test_a_folder_has_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = quick_lease(tmp_path), quick_lease(tmp_path)
    first.acquire()
    says = rf"^another run writes there, process {os.getpid()} of '.*'; stop it .* remove {tmp_path / LEASE_NAME}\)$"
    with pytest.raises(LeaseError, match=says):
        second.acquire()
    second.release()  # it has none to give back
    assert (tmp_path / LEASE_NAME).exists()
    first.release()
    assert not list(tmp_path.iterdir())
    second.acquire()
    second.release()


@pytest.mark.parametrize("machine", ["", "another machine"])
def test_a_live_holder_refuses_others(machine: str, tmp_path: Path) -> None:
    process = start_holder(tmp_path, machine)
    with pytest.raises(LeaseError, match=rf"process {process.pid} of"):
        quick_lease(tmp_path).acquire()
    kill(process)


def test_a_killed_holder_leaves_nothing_behind(tmp_path: Path) -> None:
    """On the same machine, at once."""
    kill(start_holder(tmp_path))
    assert (tmp_path / LEASE_NAME).exists()
    lease = quick_lease(tmp_path)
    assert waited(lease) < EXPIRY_S / 2
    lease.release()


@pytest.mark.parametrize("is_zombie", [True, False], ids=["a zombie", "its number is another's now"])
def test_a_process_that_is_there_may_be_dead(is_zombie: bool, tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "1000"])
    born = lease_module._born(process.pid)
    assert born
    if is_zombie:
        process.kill()  # its parent has not looked at it yet
        while lease_module._born(process.pid):
            time.sleep(0.01)
    lease = quick_lease(tmp_path)
    fields = vars(lease._me) | {"token": "of another", "pid": process.pid, "born": born if is_zombie else "1"}
    (tmp_path / LEASE_NAME).write_text(json.dumps(fields))
    assert waited(lease) < EXPIRY_S / 2
    lease.release()
    process.kill()
    process.wait()


def test_one_of_another_machine_has_time_to_give_a_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start_holder(tmp_path, "another machine")
    kill(process)
    lease = quick_lease(tmp_path)
    assert EXPIRY_S <= waited(lease) < EXPIRY_S + 5
    assert f"held by process {process.pid} of" in capsys.readouterr().err
    lease.release()


def test_one_that_was_away_for_too_long_leaves(tmp_path: Path) -> None:
    """Stopped on another machine, taken for dead, and then it goes on: two would write the same files."""
    process = start_holder(tmp_path, "another machine")
    os.kill(process.pid, signal.SIGSTOP)
    lease = quick_lease(tmp_path)
    lease.acquire()
    os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == 1
    assert json.loads((tmp_path / LEASE_NAME).read_text())["pid"] == os.getpid()
    lease.release()


@pytest.mark.parametrize("is_there", [False, True], ids=["no lease", "that of a dead one"])
def test_of_many_that_start_at_once_one_gets_it(is_there: bool, tmp_path: Path) -> None:
    if is_there:
        kill(start_holder(tmp_path))
    processes, answers = start_racers(tmp_path, 6)
    assert sorted(answers) == [False] * 5 + [True]
    for process in processes:
        kill(process)


@pytest.mark.parametrize("content", ["", "garbage", "[1]", '{"token": 3}'])
def test_a_file_that_is_no_lease_is_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / LEASE_NAME).write_text(content)
    lease = quick_lease(tmp_path)
    lease.acquire()
    assert json.loads((tmp_path / LEASE_NAME).read_text())["pid"] == os.getpid()
    lease.release()


def test_a_lease_that_is_removed_comes_back(tmp_path: Path) -> None:
    lease = quick_lease(tmp_path)
    lease.acquire()
    (tmp_path / LEASE_NAME).unlink()
    deadline = time.monotonic() + 30
    while not (tmp_path / LEASE_NAME).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(LeaseError):
        quick_lease(tmp_path).acquire()
    lease.release()


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    lease = quick_lease(tmp_path)
    lease.acquire()
    with pytest.raises(LeaseError):
        quick_lease(tmp_path).acquire()
    lease.release()
    assert not list(tmp_path.iterdir())
